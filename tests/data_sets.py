"""Rows with the columns of public data sets. All are made for the tests; none is from a data set itself.

`ROWS[name]` has about three rows with every column of the data set, as docs/data.md lists them.
"""

from typing import Any


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str, **fields: Any) -> dict[str, Any]:
    return {"from": "human", "value": text, **fields}


def gpt(text: str, **fields: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **fields}


ASK = [f"What is {n} plus {n}, my dear friend?" for n in range(1, 4)]
GOOD = [f"The sum of both is {2 * n}." for n in range(1, 4)]
BAD = [f"I think that it is {n}." for n in range(1, 4)]
SYSTEM = ["You are a patient teacher.", "", "You answer in one short sentence."]
TRIPLES = list(zip(ASK, GOOD, BAD, strict=True))
Rows = list[dict[str, Any]]


def hh() -> Rows:
    begin = "\n\nHuman: {}\n\nAssistant: {}"
    return [{"chosen": begin.format(q, a), "rejected": begin.format(q, b)} for q, a, b in TRIPLES]


def ultrafeedback() -> Rows:
    def item(text: str, score: float) -> dict[str, Any]:
        return {
            "model": "a-model", "principle": "helpfulness", "custom_system_prompt": "Be kind to the person.",
            "annotations": {"honesty": {"Rating": "5", "Rationale": "It says what it knows."}}, "response": text,
            "critique": "A good answer to it.", "fine-grained_score": score, "overall_score": score,
        }  # fmt: skip

    return [
        {
            "source": "flan", "instruction": q, "models": ["a-model", "b-model"],
            "completions": [item(b, 2.0), item(a, 8.5)], "correct_answers": ["None"], "incorrect_answers": ["None"],
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def binarized() -> Rows:
    return [
        {
            "prompt": q, "prompt_id": "0" * 64, "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)],
            "messages": [user(q), assistant(a)], "score_chosen": 8.5, "score_rejected": 2.0,
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def distilabel_orca() -> Rows:
    return [
        {
            "system": SYSTEM[i], "input": q, "chosen": a, "rejected": b, "generations": [a, b], "order": ["chosen"],
            "labelling_model": "gpt", "labelling_prompt": [user(f"Rate these two answers to {q}")],
            "raw_labelling_response": f"7 and 3 for {q}", "rating": [7, 3], "rationale": f"The first knows {q}",
            "status": "unchanged", "original_chosen": a, "original_rejected": b, "chosen_score": 7.0,
            "in_gsm8k_train": False,
        }
        for i, (q, a, b) in enumerate(TRIPLES)
    ]  # fmt: skip


def capybara_dpo() -> Rows:
    return [
        {
            "source": "Airoboros", "conversation": [{"input": q, "output": "An original answer of it."}],
            "original_response": "An original answer of it.", "generation_prompt": [q, q],
            "raw_generation_responses": [a, b], "new_generations": [a, b], "prompt": q,
            "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)], "rating_chosen": 5,
            "rating_rejected": 2, "chosen_model": "a", "rejected_model": "b",
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def helpsteer2() -> Rows:
    numbers = {"correctness": 3, "coherence": 4, "complexity": 1, "verbosity": 1}
    turns = "Hello there!<extra_id_1>Assistant\nHello, how are you?\n<extra_id_1>User\n"
    return [
        {"prompt": prompt, "response": text, "helpfulness": score, **numbers}
        for i, (q, a, b) in enumerate(TRIPLES)
        for prompt in [turns + q if i == 2 else q]
        for text, score in ((b, 1), (a, 4))
    ]


def helpsteer2_preference() -> Rows:
    return [
        {
            "split": "train", "prompt": q, "response_1": b, "response_2": a, "preference_strength": 2,
            "preference_statement": f"The second is better on {q}", "preference_elaboration": f"It is right about {q}",
            "three_most_similar_preferences": [{"statement": "The second is right."}],
            "all_preferences_unprocessed": [{"strength": 2, "justification": f"Because of {q}"}],
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def helpsteer3() -> Rows:
    return [
        {
            "domain": "general", "language": "english", "context": [user("Hi!"), assistant("Hello!"), user(q)],
            "response1": a, "response2": b, "overall_preference": -3,
            "individual_preference": [{"score": -3, "reasoning": f"The first is right on {q}", "feedback1": "Good."}],
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def shp() -> Rows:
    return [
        {
            "post_id": "x1", "domain": "askscience_train", "upvote_ratio": 0.9, "history": q, "c_root_id_A": "h1",
            "c_root_id_B": "h2", "created_at_utc_A": 1600000000, "created_at_utc_B": 1600000001, "score_A": 3,
            "score_B": 30, "human_ref_A": b, "human_ref_B": a, "labels": 0, "seconds_difference": 1.0,
            "score_ratio": 10.0,
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def saferlhf() -> Rows:
    return [
        {
            "prompt": q, "response_0": b, "response_1": a, "prompt_source": "made", "response_0_source": "a-model",
            "response_1_source": "a-model", "is_response_0_safe": True, "is_response_1_safe": True,
            "response_0_harm_category": {"Violence": False}, "response_1_harm_category": {"Violence": False},
            "response_0_severity_level": 0, "response_1_severity_level": 0, "better_response_id": 1,
            "safer_response_id": 0, "response_0_sha256": "0" * 64, "response_1_sha256": "1" * 64,
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def webgpt() -> Rows:
    quotes = {"title": ["A page of sums"], "extract": ["One and one are two of course."]}
    return [
        {
            "question": {"dataset": "eli5", "id": str(i), "full_text": q}, "quotes_0": quotes, "answer_0": b,
            "tokens_0": {"prefix": [1], "completion": [2]}, "score_0": -0.5, "quotes_1": quotes, "answer_1": a,
            "tokens_1": {"prefix": [1], "completion": [3]}, "score_1": 0.5,
        }
        for i, (q, a, b) in enumerate(TRIPLES)
    ]  # fmt: skip


def summaries() -> Rows:
    return [
        {
            "info": {"id": "t3", "post": q, "title": "A question of sums", "subreddit": "math", "site": None,
                     "article": None},
            "summaries": [{"text": b, "policy": "sup", "note": "none at all"}, {"text": a, "policy": "ppo"}],
            "choice": 1, "worker": "w", "batch": "batch3", "split": "train", "extra": {"confidence": 7},
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


def stack_paired() -> Rows:
    meta = ["https://math.example/1", "https://math.example"]
    return [
        {"qid": i, "question": q, "date": "2011/01/01", "metadata": meta, "response_j": a, "response_k": b}
        for i, (q, a, b) in enumerate(TRIPLES)
    ]


def stack_scored() -> Rows:
    def item(text: str, score: int) -> dict[str, Any]:
        return {
            "answer_id": 1, "author": "A Person Of Note", "author_id": 1, "author_profile": "https://math.example/1",
            "pm_score": score, "selected": score > 2, "text": text,
        }  # fmt: skip

    return [
        {"qid": i, "question": q, "answers": [item(b, 0), item(a, 5)], "date": "2011/01/01", "metadata": ["x"]}
        for i, (q, a, b) in enumerate(TRIPLES)
    ]


def _oasst_node(name: str, parent: str | None, role: str, text: str, rank: int | None, **fields: Any) -> dict[str, Any]:
    return {
        "message_id": name, "parent_id": parent, "user_id": "u", "created_date": "2023-02-05T14:23:50", "text": text,
        "role": role, "lang": "en", "review_count": 3, "review_result": True, "deleted": False, "rank": rank,
        "synthetic": False, "model_name": None, "detoxify": {"toxicity": 0.1}, "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [1]}, "labels": {"name": ["quality"], "value": [0.9]}, **fields,
    }  # fmt: skip


def oasst_table() -> Rows:
    return [
        node
        for i, (q, a, b) in enumerate(TRIPLES)
        for node in (
            _oasst_node(f"q{i}", None, "prompter", q, None, message_tree_id=f"q{i}"),
            _oasst_node(f"b{i}", f"q{i}", "assistant", b, 1, message_tree_id=f"q{i}"),
            _oasst_node(f"a{i}", f"q{i}", "assistant", a, 0, message_tree_id=f"q{i}"),
        )
    ]


def oasst_trees() -> Rows:
    rows = []
    for i, (q, a, b) in enumerate(TRIPLES):
        replies = [_oasst_node(f"x{rank}", f"q{i}", "assistant", text, rank, replies=[])
                   for text, rank in ((b, 1), (a, 0))]  # fmt: skip
        prompt = _oasst_node(f"q{i}", None, "prompter", q, None, replies=replies)
        rows.append({"message_tree_id": f"q{i}", "tree_state": "ready_for_export", "prompt": prompt})
    return rows


def tulu3() -> Rows:
    return [
        {
            "id": f"x_{i}", "source": "a-source", "prompt": q, "chosen": [user(q), assistant(a)],
            "rejected": [user(q), assistant(b)], "chosen_model": "a", "rejected_model": "b",
        }
        for i, (q, a, b) in enumerate(TRIPLES)
    ]  # fmt: skip


def magpie() -> Rows:
    return [
        {
            "uuid": str(i), "model": "a-model",
            "gen_input_configs": {"temperature": 1.0, "extract_input": "A long one of it"},
            "instruction": q, "response": a, "conversations": [human(q), gpt(a)], "task_category": "Math",
            "difficulty": "easy", "intent": f"The user wants to know {q}", "knowledge": f"One must know {q}",
            "input_quality": "good", "quality_explanation": f"It is clear about {q}", "llama_guard_2": "safe",
            "reward_model": "a-reward-model", "instruct_reward": 1.0, "min_neighbor_distance": 0.1, "repeat_count": 0,
            "min_similar_uuid": "x", "instruction_length": 20, "response_length": 30, "language": "EN",
        }
        for i, (q, a, _) in enumerate(TRIPLES)
    ]  # fmt: skip


def openhermes() -> Rows:
    nothing = dict.fromkeys(
        "custom_instruction topic model_name model skip_prompt_formatting views language id title idx hash "
        "avatarUrl".split()
    )
    return [
        {**nothing, "category": None, "conversations": [human(q), gpt(a)], "system_prompt": SYSTEM[i] or None,
         "source": "airoboros"}
        for i, (q, a, _) in enumerate(TRIPLES)
    ]  # fmt: skip


def alpaca() -> Rows:
    header = (
        "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:\n{}"
    )
    return [
        {"instruction": q, "input": extra, "output": a, "text": header.format(q, extra, a)}
        for (q, a, _), extra in zip(TRIPLES, ("", "Take it slow.", ""), strict=True)
    ]


def slimorca() -> Rows:
    return [
        {"conversations": [
            {"from": "system", "value": "Think step by step.", "weight": None}, human(q, weight=0.0), gpt(a, weight=1.0)
        ]}
        for q, a, _ in TRIPLES
    ]  # fmt: skip


def arena() -> Rows:
    return [
        {
            "question_id": str(i), "model_a": "a", "model_b": "b", "winner": "model_b", "judge": "arena_user_1",
            "conversation_a": [user(q), assistant(b)], "conversation_b": [user(q), assistant(a)], "turn": 1,
            "anony": True, "language": "English", "tstamp": 1.7e9, "openai_moderation": {"flagged": False},
            "toxic_chat_tag": {"flagged": False},
        }
        for i, (q, a, b) in enumerate(TRIPLES)
    ]  # fmt: skip


def nemo() -> Rows:
    return [
        {
            "context": [user(q)], "task_name": "math",
            "completions": [{"rank": 0, "completion": [assistant(a)]}, {"rank": 1, "completion": [assistant(b)]}],
        }
        for q, a, b in TRIPLES
    ]  # fmt: skip


ROWS: dict[str, Rows] = {
    "Anthropic/hh-rlhf": hh(),
    "openbmb/UltraFeedback": ultrafeedback(),
    "HuggingFaceH4/ultrafeedback_binarized": binarized(),
    "argilla/ultrafeedback-binarized-preferences": [
        {
            "source": "flan", "instruction": q, "chosen_response": a, "rejected_response": b, "chosen_avg_rating": 5.0,
            "rejected_avg_rating": 2.0, "chosen_model": "a-model",
        }
        for q, a, b in TRIPLES
    ],
    "berkeley-nest/Nectar": [
        {
            "prompt": f"\n\nHuman: {q}\n\nAssistant: ", "turns": 1, "num_responses": 2, "source": ["lmsys"],
            "good_natured": True,
            "answers": [{"answer": b, "model": "b", "rank": 2.0}, {"answer": a, "model": "a", "rank": 1.0}],
        }
        for q, a, b in TRIPLES
    ],
    "Intel/orca_dpo_pairs": [
        {"system": SYSTEM[i], "question": q, "chosen": a, "rejected": b} for i, (q, a, b) in enumerate(TRIPLES)
    ],
    "argilla/distilabel-intel-orca-dpo-pairs": distilabel_orca(),
    "argilla/dpo-mix-7k": [
        {
            "dataset": "a/b", "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)],
            "chosen_rating": 5.0, "rejected_rating": 2.0,
        }
        for q, a, b in TRIPLES
    ],
    "argilla/distilabel-capybara-dpo-7k-binarized": capybara_dpo(),
    "llamafactory/DPO-En-Zh-20k": [
        {"conversations": [human(q)], "chosen": gpt(a), "rejected": gpt(b)} for q, a, b in TRIPLES
    ],
    "nvidia/HelpSteer2": helpsteer2(),
    "nvidia/HelpSteer2, preference": helpsteer2_preference(),
    "nvidia/HelpSteer3": helpsteer3(),
    "stanfordnlp/SHP": shp(),
    "PKU-Alignment/PKU-SafeRLHF": saferlhf(),
    "openai/webgpt_comparisons": webgpt(),
    "openai/summarize_from_feedback, comparisons": summaries(),
    "lvwerra/stack-exchange-paired": stack_paired(),
    "HuggingFaceH4/stack-exchange-preferences": stack_scored(),
    "OpenAssistant/oasst1, oasst2": oasst_table(),
    "OpenAssistant trees (jsonl export)": oasst_trees(),
    "Skywork/Skywork-Reward-Preference-80K-v0.2": [
        {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)], "source": "magpie"}
        for q, a, b in TRIPLES
    ],
    "allenai/reward-bench": [
        {
            "prompt": q, "chosen": a, "chosen_model": "a", "rejected": b, "rejected_model": "b", "subset": "math-prm",
            "id": i,
        }
        for i, (q, a, b) in enumerate(TRIPLES)
    ],
    "allenai/llama-3.1-tulu-3-8b-preference-mixture": tulu3(),
    "lmsys/chatbot_arena_conversations": arena(),
    "NeMo-RL preferences": nemo(),
    "trl-lib/ultrafeedback_binarized": [
        {
            "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)], "score_chosen": 8.0,
            "score_rejected": 2.0,
        }
        for q, a, b in TRIPLES
    ],
    "TRL, implicit prompt": [{"chosen": f"{q} {a}", "rejected": f"{q} {b}"} for q, a, b in TRIPLES],
    "trl-lib/tldr-preference": [
        {"prompt": f"{q}\n\nTL;DR:", "chosen": f" {a}", "rejected": f" {b}"} for q, a, b in TRIPLES
    ],
    "trl-lib/kto-mix-14k": [
        {"prompt": [user(q)], "completion": [assistant(text)], "label": label}
        for q, a, b in TRIPLES
        for text, label in ((a, True), (b, False))
    ],
    "Dahoas/rm-static": [
        {"prompt": f"\n\nHuman: {q}\n\nAssistant:", "response": f" {a}", "chosen": f" {a}", "rejected": f" {b}"}
        for q, a, b in TRIPLES
    ],
    "Magpie-Align/Magpie-Pro-300K-Filtered": magpie(),
    "LDJnr/Capybara": [{"source": "x", "conversation": [{"input": q, "output": a}]} for q, a, _ in TRIPLES],
    "HuggingFaceH4/ultrachat_200k": [
        {"prompt": q, "prompt_id": "0" * 64, "messages": [user(q), assistant(a)]} for q, a, _ in TRIPLES
    ],
    "teknium/OpenHermes-2.5": openhermes(),
    "tatsu-lab/alpaca": alpaca(),
    "databricks/databricks-dolly-15k": [
        {"instruction": q, "context": context, "response": a, "category": "closed_qa"}
        for (q, a, _), context in zip(TRIPLES, ("", "Sums are made of numbers.", ""), strict=True)
    ],
    "Open-Orca/SlimOrca": slimorca(),
    "Open-Orca/OpenOrca": [
        {"id": f"t.{i}", "system_prompt": SYSTEM[i], "question": q, "response": a}
        for i, (q, a, _) in enumerate(TRIPLES)
    ],
    "openai/gsm8k": [{"question": q, "answer": a} for q, a, _ in TRIPLES],
    "GAIR/lima": [{"conversations": [q, a], "source": "stackexchange"} for q, a, _ in TRIPLES],
    "trl-lib/tldr": [{"prompt": f"{q}\n\nTL;DR:", "completion": f" {a}"} for q, a, _ in TRIPLES],
    "stanfordnlp/imdb": [{"text": f"{q} {a}", "label": i % 2} for i, (q, a, _) in enumerate(TRIPLES)],
}  # fmt: skip
