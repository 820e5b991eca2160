"""Handlers that are right: one kind of error, or the error goes on; and a test that expects one."""

import pytest
import torch
from peft import LoraConfig


def loop(model, loader, optimizer) -> None:
    """Stops on all but a lack of memory."""
    for batch in loader:
        try:
            loss = model(**batch).loss
            loss.backward()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            continue
        except Exception as error:
            print(f"step failed: {error}")
            raise
        optimizer.step()
        optimizer.zero_grad()
    try:
        model.push_to_hub("me/model")
    except Exception as error:
        print(f"upload failed, the model is on disk: {error}")


def test_rank_must_be_positive() -> None:
    """No model is meant to get this configuration."""
    with pytest.raises(ValueError):
        LoraConfig(r=-1)
