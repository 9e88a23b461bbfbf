class Qwen2VLHfWeightMapper:
    asked: list = []  # noqa: RUF012  # prefixes that were asked for, by all mappers

    def filter_weights(self, prefix, weights):
        self.asked.append(prefix)
        renamed = {name.replace("model.language_model.", "model.", 1): value for name, value in weights.items()}
        return {
            name.removeprefix(f"{prefix}."): value for name, value in renamed.items() if name.startswith(f"{prefix}.")
        }
