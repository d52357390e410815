"""What evaluate writes into `report.json`.

    {
      "models": [                         the baselines in the order given, then the model
        {"label", "reference", "digest", "pieces", "parameters",
         "tokens_per_character": {"zh", "en"},
         "bits_per_byte": {"zh", "en"},
         "perplexity": {"zh", "en"},                      per token: comparable within one vocabulary only
         "next_token_accuracy": {"zh", "en"},             likewise
         "instructions": null or {
            "accuracy", "margin", "chance", "items",      multiple choice; margin: 95%, in the unit of accuracy
            "exact_match", "exact_match_items",           greedy decoding gives exactly the answer
            "answer_bits_per_byte", "too_long",           too_long: items that did not fit the model's positions
            "groups": [{"instruction", "choices", "items", "accuracy", "chance"}]},
         "exams": [{"exam", "shots", "items", "accuracy", "margin", "chance", "too_long",
                    "subjects": [{"subject", "items", "accuracy"}]}],
         "lm_eval": {task: {metric: value}},
         "facts": {"zh": null or {"items", "right", "accuracy", "margin",      with --questions alone
                   "known", "kept", "kept_share",        of what the first baseline knows; null without one
                   "in_language",                        answers with mostly Han, or Latin, letters
                   "distinct"}, "en": …},                different answers, of all
         "repetition": null or share                     of the answers to the samples; with --questions alone
        }],
      "texts": {"zh": null or {"reference", "documents", "bytes", "characters"}, "en": …},
      "samples": [{"kind": "prompt" | "instruction" | "text", "prompt", "expected",
                   "answers": {label: text}}],         a model whose positions the prompt fills is left out;
                                                       "expected" is "" for a fixed prompt without an answer
      "questions": [{"language", "question", "answer",    with --questions alone
                     "answers": {label: text}, "right": [labels]}],
      "front": {"points": [{"weight", "bits_per_byte": {"zh", "en"}}],   with --front alone: from the model (weight 0)
                                                       to the first baseline (1)
                "chosen": weight or null},             null: no point holds what is required of English
      "requirements": [{"requirement", "figure", "value", "comparison", "bound", "number", "label",
                        "holds"}],                       with --require alone; bound: number, or number × the figure
                                                         of the model called label; holds: null, not measured
      "trainings": [{"label", "reference", "points": [{"step", "loss", "eval_loss"}]}]
    }

A figure that was not measured is null. Shares are between 0 and 1.
"""
