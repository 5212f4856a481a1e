"""From expert ratings of images to a tuned image model: the names that one reaches for first, each from its own room.

A stage is a function of its settings: `generate(load_settings("generate", "pocket", limit=4))`. All else is in the
rooms, in the order in which data flows: `core`, `images`, `pocket`, `ratings`, `reward`, `tuning`, `proof`.
"""
from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# name here: (room.module, name there). A name is loaded when it is first asked for (PEP 562), so that `import mhrlhf`
# and `mhrlhf --help` do not wait for torch. The library for this, lazy_loader, cannot rename what it loads.
_FACE = {
    "InputError": ("core.files", "InputError"),
    "load_settings": ("core.settings", "load_settings"),
    "load_pipeline": ("images.models", "load_pipeline"),
    "RatingStore": ("ratings.store", "RatingStore"),
    "RatingPanel": ("ratings.panel", "RatingPanel"),
    "agreement_report": ("ratings.agreement", "agreement"),
    "RewardModel": ("reward.model", "RewardModel"),
    "load_adapter": ("proof.inference", "load_adapter"),
    # the stages, in the order of the workflow
    "generate": ("images.generate", "run"),
    "annotate": ("ratings.annotate", "run"),
    "train_reward": ("reward.train", "run"),
    "score": ("reward.score", "run"),
    "tune": ("tuning.dspo", "run"),
    "evaluate": ("proof.evaluate", "run"),
    "infer": ("proof.inference", "run"),
}
__all__ = [
    "InputError", "load_settings", "load_pipeline", "RatingStore", "RatingPanel", "agreement_report", "RewardModel",
    "load_adapter", "generate", "annotate", "train_reward", "score", "tune", "evaluate", "infer",
]

if TYPE_CHECKING:  # the same for editors and type checkers, which read and do not run
    from .core.files import InputError
    from .core.settings import load_settings
    from .images.generate import run as generate
    from .images.models import load_pipeline
    from .proof.evaluate import run as evaluate
    from .proof.inference import load_adapter, run as infer
    from .ratings.agreement import agreement as agreement_report
    from .ratings.annotate import run as annotate
    from .ratings.panel import RatingPanel
    from .ratings.store import RatingStore
    from .reward.model import RewardModel
    from .reward.score import run as score
    from .reward.train import run as train_reward
    from .tuning.dspo import run as tune

def __getattr__(name):
    if name not in _FACE: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _FACE[name]
    globals()[name] = getattr(import_module(f".{module}", __name__), there)  # the next time it is simply there
    return globals()[name]

def __dir__():
    return sorted({*globals(), *_FACE})
