"""Sampling of the models that a run saved."""

import datetime
import gc
import weakref
from types import SimpleNamespace

from exo.rollouts import saved_models
from exo.rollouts.samples import Settings
from exo.rollouts.saved_models import SavedModel, SavedModelSampler


class Model:
    def to(self, device):
        return self


def test_a_model_is_freed_before_the_next_one_is_loaded(monkeypatch):
    loaded = []

    def load(path):
        gc.collect()
        assert all(reference() is None for reference in loaded), "an earlier model is still in memory"
        model = Model()
        loaded.append(weakref.ref(model))
        return model, None

    monkeypatch.setattr(saved_models.models, "load", load)
    monkeypatch.setattr(saved_models.render, "configure", lambda *arguments: None)
    monkeypatch.setattr(SavedModelSampler, "_draw", lambda *arguments: [])
    sampler = SavedModelSampler(
        [], Settings(1.0, 4), k=1, seed=0, batch_size=1, max_length=8, max_tokens_per_batch=8,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    saved = [SavedModel(f"step-{i}", i, str(i)) for i in range(3)]
    for _, _, scoring_models in sampler.sample(saved, None, "auto", None, datetime.date(2026, 1, 1)):
        del scoring_models
    assert len(loaded) == 3
