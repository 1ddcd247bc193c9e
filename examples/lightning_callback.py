"""Explain the same photographs at the end of each validation of a Lightning training (pip install lightning)."""

import lightning
import torch

from attrib_zoo import GradCAM, synthetic


class Classifier(lightning.LightningModule):  # noqa: D101
    def __init__(self):
        super().__init__()
        self.model = synthetic.tiny_cnn()
        self.training_step = lambda batch, _: torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.validation_step = lambda batch, _: None
        self.configure_optimizers = lambda: torch.optim.Adam(self.model.parameters(), 1e-3)


class Explain(lightning.Callback):  # noqa: D101
    def __init__(self, photos):
        self.photos, self.maps = photos, []

    def on_validation_end(self, trainer, module):  # with a logger: trainer.logger.experiment.add_images(...)
        self.maps.append(GradCAM(module.model).attribute(self.photos.to(module.device))[:, 0].cpu())


batches = [(torch.randn(4, 3, 32, 32), torch.randint(6, (4,))) for _ in range(8)]
explain = Explain(batches[0][0])
options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[explain], **options).fit(Classifier(), batches, batches)
print("maps", [tuple(maps.shape) for maps in explain.maps])
