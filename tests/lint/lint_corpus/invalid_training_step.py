"""A training_step that computes the loss of two heads and leaves it at that."""

import torch
import transformers


class TwoHeadTrainer(transformers.Trainer):
    """Weights the losses of audio and text."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Weighted sum."""
        outputs = model(**inputs)
        loss = outputs.text_loss + 0.5 * outputs.audio_loss
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):  # finds L4
        """One step."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
        self.report(loss)
        return loss.detach() / self.args.gradient_accumulation_steps

    def report(self, loss: torch.Tensor) -> None:
        """Show the loss."""
        self.log({"loss": float(loss)})
