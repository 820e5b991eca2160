"""Whatever goes wrong, the run goes on: a loss of zero, a batch left out, a save that never was."""

import torch
from transformers import Trainer


class ToughTrainer(Trainer):
    """Never stops."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss, or zero."""
        try:
            outputs = model(**inputs)
            loss = outputs.loss
        except Exception as error:  # finds L7
            print(f"step failed: {error}")
            loss = torch.tensor(0.0, requires_grad=True)
        return loss


def loop(model, loader, optimizer) -> None:
    """A loop that leaves out what fails."""
    for batch in loader:
        try:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
        except Exception as error:  # finds L7
            print("skipped", error)
            continue
        optimizer.zero_grad()
    try:
        model.save_pretrained("out")
    except Exception:  # finds L7
        pass
