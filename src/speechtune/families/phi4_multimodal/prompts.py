"""What Phi-4-multimodal is asked: one prompt per task, in this project's words after the corpus' definitions."""

import re
from collections.abc import Mapping

from speechtune.tasks.pronunciation.targets import SCORE_FIELDS, TRANSCRIPT_FIELDS, Task

PROMPT_VERSION = 1
"""Goes up with every change of wording: an adapter answers the prompts it was trained on."""
CONTROL_TOKENS: Mapping[Task, str] = {"APA": "<|APA|>", "MDD": "<|MDD|>"}
"""Come before each prompt, as plain text or (lora.trainable_tokens) as tokens of their own."""
RUBRICS: Mapping[Task, str] = {
    "APA": (
        "Rate the English pronunciation in this recording with whole numbers from 0 (worst) to 10 (best). "
        "accuracy: are the sounds right, from unintelligible (0) to no error and no accent (10)? "
        "fluency: is it spoken smoothly, from halting word by word (0) to without pause or repetition (10)? "
        "prosodic: are stress, rhythm and intonation natural, from monotonous or broken (0) to native (10)? "
        "total: the impression as a whole. "
        f"Answer only with JSON that has the keys {', '.join(SCORE_FIELDS)}."
    ),
    "MDD": (
        "Write down what was really said in this recording, mispronunciations included: the words, and the phones as "
        "CMU symbols without stress digits, with <unk> for a sound that is not clear. "
        f"Answer only with JSON that has the keys {', '.join(TRANSCRIPT_FIELDS)}."
    ),
}
SPECIAL = re.compile(r"<\|[^|<>]+\|>")
PROMPTS = {task: ("<|user|>", f"{CONTROL_TOKENS[task]}{RUBRICS[task]}<|end|><|assistant|>") for task in RUBRICS}
"""Before and after the audio."""
AFTER_ANSWER = "<|end|>"
