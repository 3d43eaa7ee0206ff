"""Every generated task in a small size: what all of them must fulfil runs over these."""

import pytest

from memlib.config import CopyConfig, MixedConfig, PasskeyConfig, QaConfig, RecallConfig
from memlib.tasks import Copy, Mixed, Passkey, Qa, Recall

VARIANTS = {
    "recall": lambda low=None: Recall(RecallConfig(), 16, 4, low),
    "mixed": lambda low=None: Mixed(MixedConfig(num_facts=8, num_settings=2, fact_queries=2), 16, 4, low),
    "recall-rewrites": lambda low=None: Recall(RecallConfig(rewrites=2), 16, 4, low),
    "recall-spread": lambda low=None: Recall(RecallConfig(num_pairs=12, num_queries=5), 16, 4, low),
    "passkey": lambda low=None: Passkey(PasskeyConfig(num_digits=3), 16, 4, low),
    "copy": lambda low=None: Copy(CopyConfig(), 16, 4, low),
    "copy-selective": lambda low=None: Copy(CopyConfig(selective=True), 16, 4, low),
    "qa-1": lambda low=None: Qa(QaConfig(supporting_facts=1, distractors=1), 16, 5, low),
    "qa-2": lambda low=None: Qa(QaConfig(supporting_facts=2, distractors=0), 16, 5, low),
    "qa-3": lambda low=None: Qa(QaConfig(supporting_facts=3, distractors=0), 16, 5, low),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def make(request):
    """A function from segments_min to the task."""
    return request.param


@pytest.fixture
def task(make):
    return make()
