"""Does the suite notice faults in ``fit``, ``save`` and ``load``?"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import torch
from contract_samples import SmallTrained
from planted_faults import assert_caught, caught_by, planted_in


@caught_by(unfitted="expected the message to name")
class WordlessBeforeFit(SmallTrained):
    def ready(self):
        if self.network_ is None:
            raise RuntimeError("not ready")


@caught_by(unfitted="attribute before fit: expected an error")
class AnswersBeforeFit(SmallTrained):
    def ready(self):
        if self.network_ is None:
            self.fit([torch.rand(1, 3, 32, 32)])


@caught_by(unfitted="expected attribute.__wrapped__", wrapped="__wrapped__")
class ChecksFittedInAnOverride(SmallTrained):
    def attribute(self, inputs, target=None, additional_forward_args=None, *, show_progress=False):
        SmallTrained.ready(self)
        return SmallTrained.attribute(self, inputs, target, additional_forward_args)

    def ready(self):
        pass


@caught_by(fit_returns_self="return self")
class FitReturnsNothing(SmallTrained):
    def fit(self, *args, **kwargs):
        super().fit(*args, **kwargs)
        return None


@caught_by(fit_returns_self="end in '_', got losses")
class PlainNames(SmallTrained):
    def fit(self, *args, **kwargs):
        super().fit(*args, **kwargs)
        self.losses = []
        return self


@caught_by(fit_returns_self="Raised ValueError: loader")
class ImagesAlone(SmallTrained):
    def batch(self, batch):
        return super().batch(None if isinstance(batch, (tuple, list, dict)) else batch)


@caught_by(refit="second fit against")
class ContinuesTheFirstFit(SmallTrained):
    def start(self, loader, seed, resume_from):
        found = super().start(loader, seed, resume_from)
        if self.previous is not None:
            self.network_ = self.previous
        return found

    previous = None

    def fit(self, *args, **kwargs):
        type(self).previous = self.network_
        try:
            return super().fit(*args, **kwargs)
        finally:
            type(self).previous = None


@caught_by(fit_leaves_model="torch's global generator")
class FitSeedsTheGlobalGenerator(SmallTrained):
    def fit(self, *args, seed=0, **kwargs):
        torch.manual_seed(seed)
        return super().fit(*args, seed=seed, **kwargs)


@caught_by(fit_leaves_model="buffer stages.0.1.running_mean")
class FitMovesBatchNorm(SmallTrained):
    def step(self, images):
        self.model.train()
        super().step(images)
        self.model.eval()


@caught_by(fit_leaves_model="fitted with the model in training mode")
class FitsInTheGivenMode(SmallTrained):
    """Dropout runs; BatchNorm's statistics are restored afterwards, so only the values tell."""

    def train_all(self, *args):
        saved = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        super().train_all(*args)
        for name, buffer in self.model.named_buffers():
            buffer.copy_(saved[name])

    @contextlib.contextmanager
    def quiet(self):
        flags = [(module, module.training) for module in self.model.modules()]
        self.model.train(self.model.head.training)
        try:
            yield
        finally:
            for module, flag in flags:
                module.training = flag


@caught_by(fit_leaves_model="gradient of parameter")
class FitUsesTheModelsGradients(SmallTrained):
    def step(self, images):
        super().step(images)
        for parameter in self.model.parameters():
            parameter.grad = None


@caught_by(fit_leaves_model="value of parameter")
class FitTrainsTheModel(SmallTrained):
    def step(self, images):
        super().step(images)
        with torch.no_grad():
            self.model.head.bias.add_(0.01)


@caught_by(fit_leaves_model="requires_grad of parameter")
class FitUnfreezes(SmallTrained):
    def step(self, images):
        super().step(images)
        self.model.requires_grad_(True)


@caught_by(fit_leaves_model_on_error="hooks|training")
class FailedFitLeavesAMess(SmallTrained):
    def train_all(self, *args):
        handle = self.layer().register_forward_hook(lambda *_: None)
        super().train_all(*args)
        handle.remove()


@caught_by(fit_leaves_model_on_error="the maps after failed fits")
class FailedFitForgetsTheFirst(SmallTrained):
    def fit(self, loader, **kwargs):
        def watched():
            for batch in loader:
                self.network_.weight.data *= 0.5
                yield batch

        if self.network_ is None:
            return super().fit(loader, **kwargs)
        return super().fit(list(watched()), **kwargs)


@caught_by(bad_loader="an empty loader")
class TakesAnEmptyLoader(SmallTrained):
    def fit(self, loader, **kwargs):
        return super().fit(loader or [torch.rand(1, 3, 32, 32)], **kwargs)


@caught_by(bad_loader="images of two sizes: expected an error")
class TakesTwoSizes(SmallTrained):
    def batch(self, batch):
        self.__dict__.pop("size", None)
        return super().batch(batch)


@caught_by(resume="resumed in the second epoch")
class ForgetsTheMomentum(SmallTrained):
    def start(self, *args):
        found = super().start(*args)
        self.momentum = torch.zeros_like(self.momentum)
        return found


@caught_by(resume="resumed in the second epoch")
class StartsTheEpochAgain(SmallTrained):
    def start(self, *args):
        return super().start(*args) // 3 * 3


@caught_by(save_load="without pickle|cannot read")
class SavesAPickle(SmallTrained):
    def write(self, path, step=0):
        torch.save({"weight": self.network_.weight.detach()}, path)


@caught_by(save_load="loaded against saved")
class SavesHalf(SmallTrained):
    def write(self, path, step=0):
        weight = self.network_.weight.data
        self.network_.weight.data = weight.half().to(weight)
        super().write(path, step)
        self.network_.weight.data = weight


@caught_by(save_load="torch's global generator")
class LoadDrawsFromTheGlobalGenerator(SmallTrained):
    @classmethod
    def load(cls, path, model, *, strict_backbone=True):
        torch.rand(1)
        return super().load(path, model, strict_backbone=strict_backbone)


@caught_by(save_load="one file")
class LeavesATemporaryFile(SmallTrained):
    def write(self, path, step=0):
        super().write(Path(f"{path}.tmp"), step)
        super().write(path, step)


@caught_by(other_backbone="one weight changed: expected an error")
class TakesAnyBackbone(SmallTrained):
    def fingerprint(self):
        return "same"


@caught_by(other_backbone="one BatchNorm mean changed: expected an error")
class LooksAtParametersOnly(SmallTrained):
    def fingerprint(self):
        return str(sum(float(p.double().sum()) for p in self.model.parameters()))


@caught_by(other_backbone="expected strict_backbone=False to warn")
class LoadsWithoutAWord(SmallTrained):
    @classmethod
    def load(cls, path, model, *, strict_backbone=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super().load(path, model, strict_backbone=strict_backbone)


@planted_in(__name__)
def test_the_check_catches_the_fault_for_its_reason(cls, name, words):
    assert_caught(cls, name, words)
