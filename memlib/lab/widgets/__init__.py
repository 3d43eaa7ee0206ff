"""Widgets: interactive views of a recording. `view.py` defines a view.

gates_over_time    gate values over tokens; `strips`: any values in 0 … 1
fusion_over_time   fusion weights of each token (attention and memories), and the retrieval gate
chapters_over_time a router's chapter probabilities or weights, token by token
slots_over_time    every slot of a memory, segment by segment; `slot_view`: your own measures
levels_over_time   the levels of a hierarchy of states, and what remains in each of its banks
inspect_slots      one slot: its writers, its readers, and the answers without it
reading_over_text  the earlier tokens from which a token reads; `reading`: any weights
hits_view          the past tokens that one token retrieves, by head, with score and weight
launch_view        a recorded kernel launch: what each program loads and stores, in order
watch              a training run, live; pause, step, stop
Form               controls that rebuild a view
save_page          views as one HTML file
drive              moves every control to its ends and its middle, to test a notebook's widgets
"""

from memlib.lab.widgets.chapters import chapters_over_time
from memlib.lab.widgets.drive import drive
from memlib.lab.widgets.form import Form
from memlib.lab.widgets.gates import fusion_over_time, gates_over_time
from memlib.lab.widgets.hits import hits_view
from memlib.lab.widgets.host import Stage
from memlib.lab.widgets.inspector import inspect_slots
from memlib.lab.widgets.launches import launch_view
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
    "launch_view",
    "watch",
    "Form",
    "page",
    "save_page",
    "drive",
]
