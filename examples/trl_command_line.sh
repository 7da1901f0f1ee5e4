#!/bin/sh
# trl's command line, defended. CHATS is a folder with .jsonl files, or a data set on the Hub.
#
# sh examples/trl_command_line.sh MODEL CHATS CONCEPTS OUTPUT
set -e
mkdir -p "$4"
cat > "$4/defenses.yaml" <<END
defenses:
  - ablate: {concepts: $3}
  - kl: {weight: 0.1}
END
python -m narrowly.integrations.trl sft --defenses "$4/defenses.yaml" \
    --model_name_or_path "$1" --dataset_name "$2" --output_dir "$4" \
    --assistant_only_loss --use_peft --lora_target_modules all-linear \
    --max_steps 10 --bf16 False --report_to none
narrowly defenses "$4"  # what was active; fails if nothing was
