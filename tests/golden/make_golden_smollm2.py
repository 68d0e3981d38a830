"""Writes tests/golden/smollm2.json: what transformers computes with SmolLM2-135M-Instruct.

The numbers are those of torch in float32 on a CPU; `make parity` compares lsjax with them. Needs
torch and transformers >= 5 (`make peers`) and the model as a Hugging Face directory:

    lsjax convert models/SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    python tests/golden/make_golden_smollm2.py models/smollm2 tests/golden/smollm2.json
"""

import json
import sys
from pathlib import Path

import torch
import transformers

NEW_TOKENS = 48
PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a little girl named Lily who",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
]
QUESTION = "What is 7 + 5? Explain in one sentence."
PARAGRAPH = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is "
    "named after the engineer Gustave Eiffel, whose company designed and built the tower from 1887 "
    "to 1889. Although initially criticised by some of France's leading artists and intellectuals "
    "for its design, it has since become a global cultural icon of France and one of the most "
    "recognisable structures in the world."
)


@torch.no_grad()
def main(directory: Path, destination: Path) -> None:
    """Greedy tokens of four prompts; the loss of a paragraph at every exit, 0 to L layers run."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    question = [{"role": "user", "content": QUESTION}]
    chat = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    greedy = []
    for text in [*PROMPTS, chat]:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=2,
        )
        new = out[0, ids.shape[1] :].tolist()
        greedy.append({"prompt": text, "ids": ids[0].tolist(), "new": new})
    ids = tokenizer(PARAGRAPH, add_special_tokens=False, return_tensors="pt").input_ids
    out = model(ids, output_hidden_states=True)
    exits = [model.lm_head(model.model.norm(x)) for x in out.hidden_states[:-1]] + [out.logits]
    losses = [
        torch.nn.functional.cross_entropy(x[0, :-1].double(), ids[0, 1:]).item() for x in exits
    ]
    golden = {
        "greedy": greedy,
        "question": QUESTION,
        "paragraph": {"text": PARAGRAPH, "ids": ids[0].tolist(), "exit_losses": losses},
    }
    destination.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
