"""Explain the same photographs at the end of each validation of a Lightning training (pip install lightning)."""

import lightning
import torch

from attrib_zoo import GradCAM, synthetic


class Classifier(lightning.LightningModule):  # noqa: D101
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx): ...

    def configure_optimizers(self):
        return torch.optim.Adam(self.model.parameters(), 1e-3)


class Explain(lightning.Callback):  # noqa: D101
    def on_validation_end(self, trainer, module):  # with a logger: trainer.logger.experiment.add_images(...)
        print("maps", tuple(GradCAM(module.model).attribute(photos.to(module.device))[:, 0].shape))


data = torch.utils.data.TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(6, (32,)))
loader, photos = torch.utils.data.DataLoader(data, batch_size=4), data.tensors[0][:4]
classifier = Classifier()
classifier.model = synthetic.tiny_cnn()  # yours
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
lightning.Trainer(max_epochs=3, accelerator="cpu", callbacks=[Explain()], **quiet).fit(classifier, loader, loader)
