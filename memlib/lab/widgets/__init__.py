"""Widgets: looks into a model that a person can move in. `view.py` says what a view is.

gates_over_time    gate values over tokens; `strips` shows any numbers in 0 … 1 in the same shape
chapters_over_time which chapters a router wants, token by token
slots_over_time    every slot of a memory, segment by segment; `slot_view`: numbers of one's own
inspect_slots      one slot: its writers, its readers, and the answers without it
reading_over_text  which earlier tokens a token's reading came from; `reading`: any weights
watch              a run as it trains; pause, step, stop
Form               controls that build a view anew
save_page          views as one HTML file
drive              moves every control to its ends and its middle: the test of a notebook's widgets
"""

from memlib.lab.widgets.chapters import chapters_over_time
from memlib.lab.widgets.drive import drive
from memlib.lab.widgets.form import Form
from memlib.lab.widgets.gates import gates_over_time
from memlib.lab.widgets.host import Stage
from memlib.lab.widgets.inspector import inspect_slots
from memlib.lab.widgets.page import page, save_page
from memlib.lab.widgets.reading import reading, reading_over_text
from memlib.lab.widgets.slots import slot_view, slots_over_time
from memlib.lab.widgets.strips import strips
from memlib.lab.widgets.training import watch
from memlib.lab.widgets.view import View

__all__ = [
    "View",
    "Stage",
    "gates_over_time",
    "strips",
    "chapters_over_time",
    "slots_over_time",
    "slot_view",
    "inspect_slots",
    "reading",
    "reading_over_text",
    "watch",
    "Form",
    "page",
    "save_page",
    "drive",
]
