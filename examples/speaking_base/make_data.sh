#!/bin/sh
# All data of the speaking base, from nothing, into one folder; may be killed and started again.
#   examples/speaking_base/make_data.sh FOLDER [PROCESSES]
set -e
folder=$1
processes=${2:-1}
scripts=$(dirname "$0")
started=$(date +%s)
export OMP_NUM_THREADS=1
mkdir -p "$folder"

made() {
    echo "$1: made after $((($(date +%s) - started) / 60)) min"
}

in_parts() {
    makers=
    for part in $(seq 0 $((processes - 1))); do
        python "$@" --part "$part" --parts "$processes" &
        makers="$makers $!"
    done
    for maker in $makers; do wait "$maker"; done
}

[ -e "$folder/assets/voices" ] || python "$scripts/assets.py" --output "$folder/assets"
made assets
in_parts "$scripts/speech.py" --assets "$folder/assets" --output "$folder/speech"
made speech
in_parts "$scripts/further_voices.py" --piper "$folder/assets/en_US-joe-medium.onnx" --output "$folder/speech"
made "further speech"
in_parts "$scripts/features.py" --speech "$folder/speech" --output "$folder/features"
made features
[ -e "$folder/codec" ] || python "$scripts/fit_codec.py" --features "$folder/features" --output "$folder/codec" \
    --per-voice 150 --warps 4
made codec
in_parts "$scripts/codes.py" --features "$folder/features" --codec "$folder/codec" --output "$folder/codes"
made codes
[ -e "$folder/tokenizer" ] || python "$scripts/make_tokenizer.py" --speech "$folder/speech" \
    --texts "$scripts"/../../src/speechtune/assets/demo-*/clips.jsonl --output "$folder/tokenizer"
made tokenizer
