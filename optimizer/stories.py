"""`model=stories`: a tiny Llama that the project trains itself, in seconds, on sentences from a
small grammar of its own. A real language model for tests and first steps: it predicts names,
pronouns and objects from what came before, and it can forget them.
"""

from __future__ import annotations

import random
from pathlib import Path

VERSION = 1
WIDTH, BLOCKS, HEADS, KV_HEADS, CONTEXT = 64, 4, 4, 2, 256
STEPS, BATCH, LENGTH, SEED = 300, 16, 96, 20261123

PEOPLE = {"Mia": "she", "Tom": "he", "Anna": "she", "Ben": "he", "Vera": "she", "Ivan": "he"}
THINGS = ["ball", "book", "lamp", "drum", "coat", "map", "key", "cup", "bell", "kite"]
COLOURS = ["red", "blue", "green", "yellow", "black", "white"]
PLACES = ["garden", "kitchen", "school", "forest", "river", "market", "attic", "harbour"]
MOODS = [("happy", "smiled"), ("sad", "cried"), ("tired", "slept"), ("angry", "shouted")]


def story(rng: random.Random) -> str:
    """One story of about 60 words; what is said later follows from what was said before."""
    first, second = rng.sample(sorted(PEOPLE), 2)
    he, colour, thing = PEOPLE[first], rng.choice(COLOURS), rng.choice(THINGS)
    here, there = rng.sample(PLACES, 2)
    mood, act = rng.choice(MOODS)
    count = rng.randint(2, 9)
    lines = [
        f"{first} lived near the {here} and {he} had a {colour} {thing} .",
        f"One day {first} went to the {there} with the {thing} .",
        f"There {he} met {second} , who wanted the {colour} {thing} too .",
        rng.choice(
            [
                f'" You may not take it , " said {first} , and {second} did not take it .',
                f'" You may take it , " said {first} , and {second} took the {thing} .',
                f"{second} gave {first} {count} coins , so {first} now had {count} coins .",
            ]
        ),
        f"Then {first} was {mood} and {he} {act} .",
        rng.choice(
            [
                f"The {thing} was still {colour} when {he} came back from the {there} .",
                f"In the evening {first} left the {there} and went home to the {here} .",
            ]
        ),
    ]
    return " ".join(lines)


def corpus(count: int, seed: int = SEED) -> list[str]:
    rng = random.Random(seed)
    return [story(rng) for _ in range(count)]


def train(folder: Path) -> None:
    """Train the tokenizer and the model, save both to `folder`. About 10 s on two cores."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    texts = corpus(2000)
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=256)
    tokenizer.train_from_iterator(texts, trainer)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = LlamaForCausalLM(config)
        ids = [i for text in texts for i in [1, *tokenizer.encode(text).ids, 2]]
        data = torch.tensor(ids)
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=STEPS)
        for _ in range(STEPS):
            starts = torch.randint(len(data) - LENGTH, (BATCH,))
            batch = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
            net(batch, labels=batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    net.half().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
