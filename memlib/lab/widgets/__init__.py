"""Widgets: looks into a model that a person can move in. `view.py` says what a view is.

gates_over_time    gate values over tokens; `strips` shows any numbers in 0 … 1 in the same shape
fusion_over_time   whom each token listens to: attention, the memories, and the retrieval gate
chapters_over_time which chapters a router wants, token by token
slots_over_time    every slot of a memory, segment by segment; `slot_view`: numbers of one's own
levels_over_time   the levels of a hierarchy of states, and what is left in each of its banks
inspect_slots      one slot: its writers, its readers, and the answers without it
reading_over_text  which earlier tokens a token's reading came from; `reading`: any weights
hits_view          for one token, what came back from past tokens: by head, with score and weight
watch              a run as it trains; pause, step, stop
Form               controls that build a view anew
save_page          views as one HTML file
drive              moves every control to its ends and its middle: the test of a notebook's widgets
"""

from memlib.lab.widgets.chapters import chapters_over_time
from memlib.lab.widgets.drive import drive
from memlib.lab.widgets.form import Form
from memlib.lab.widgets.gates import fusion_over_time, gates_over_time
from memlib.lab.widgets.hits import hits_view
from memlib.lab.widgets.host import Stage
from memlib.lab.widgets.inspector import inspect_slots
from memlib.lab.widgets.levels import levels_over_time
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
    "fusion_over_time",
    "strips",
    "chapters_over_time",
    "slots_over_time",
    "slot_view",
    "levels_over_time",
    "inspect_slots",
    "reading",
    "reading_over_text",
    "hits_view",
    "watch",
    "Form",
    "page",
    "save_page",
    "drive",
]
