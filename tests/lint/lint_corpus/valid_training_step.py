"""training_step done right: by super, by accelerator.backward, by a helper; and Lightning, where none is needed."""

import pytorch_lightning as pl
from transformers import Seq2SeqTrainer, Trainer


class Timed(Trainer):
    """Counts steps."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One step."""
        self.steps = getattr(self, "steps", 0) + 1
        return super().training_step(model, inputs, num_items_in_batch)


class Own(Seq2SeqTrainer):
    """Own backward, in a method."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One step."""
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.propagate(loss)
        return loss.detach()

    def propagate(self, loss) -> None:
        """Backward."""
        self.accelerator.backward(loss)


class Module(pl.LightningModule):
    """Lightning calls backward by itself."""

    def training_step(self, batch, batch_idx):
        """Loss."""
        return self(batch).loss
