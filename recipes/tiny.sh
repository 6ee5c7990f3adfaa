#!/usr/bin/env bash
# Train weights like weights/semo-tiny.safetensors: 96 px, one motion token of 64 numbers, for real photos and the synthetic world.
#
#     recipes/tiny.sh VIDEOS [VIDEOS ...]          from the root of the repository; each VIDEOS is a folder of videos
#     MESH=mesh/bin/python recipes/tiny.sh ...     with labels: MESH is a Python that has requirements-measure.txt
#     PHOTOS=DIR MESH=... recipes/tiny.sh ...      stage 1 sees photos, too, turned by the depth of their faces (docs/data.md)
#     POINTS=FILE MESH=... recipes/tiny.sh ...     lips also by dlib's 68 points (pip install dlib-bin in MESH; docs/data.md)
#     STEPS=200 GEN_STEPS=200 MESH_STEPS=20 recipes/tiny.sh ...  a short trial of the whole chain
#
# Put videos of one kind into one folder (news presenters, interviews, ...): folders are drawn equally, then persons, then
# clips, so that a large folder does not displace a small one. MODEL_CARD.md lists the data of the embedded weights: two
# folders, 1,200 clips of 270 persons, at last with 244 photos of 142 more. One stage 1 step of 80 pictures takes about
# 1.4 s on one core of a server CPU: 20,000 steps are 8 hours. Every command resumes where it stopped; run the script again
# after an interruption.
#
# The embedded weights were trained in thirteen runs with earlier forms of this code, starting from older 64 px weights.
# This is the same method in one run from random weights: expect similar numbers, not the same file.
set -euo pipefail
[ $# -gt 0 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
OUT=${OUT:-runs/tiny}

# 1. Videos -> clips of one face at 25 fps with 16 kHz sound. dropped.jsonl says what was left out and why.
sets=()
for videos in "$@"; do
    folder="$OUT/sets/$(basename "$videos")"
    python data.py prepare --videos "$videos" --out "$folder"
    sets+=("$folder")
done

# 2. Optional labels: place of mouth and eyes, opening, lids, head pose. Without them pairs are chosen by time alone, the usual
#    place of mouth and eyes is weighted, and real clips have no auxiliary loss.
stage1=("${sets[@]}")
if [ -n "${MESH:-}" ]; then
    if [ -n "${PHOTOS:-}" ]; then
        "$MESH" -m media.turn --input "$PHOTOS" --out "$OUT/turned"
        python data.py prepare --videos "$OUT/turned" --out "$OUT/sets/turned"
        stage1+=("$OUT/sets/turned")
    fi
    "$MESH" -m media.landmarks --data "${stage1[@]}" ${POINTS:+--shape-predictor "$POINTS"}
fi

# 3. Stage 1, motion encoder and decoder. The synthetic world is one of the sets. Look at OUT/ae/step*.png now and then:
#    reference | target | output after 1 step | after 4, on persons of the test split.
python train_ae.py --preset tiny --data "${stage1[@]}" synthetic --steps "${STEPS:-20000}" --out "$OUT/ae"

# 4. With MESH, a finish of stage 1: a face mesh reads what the decoder draws (needs pip install tflite). First the decoder
#    alone, then both networks at a lower rate; each time the mean with the weights before is kept.
ae="$OUT/ae/semo.safetensors"
if [ -n "${MESH:-}" ]; then
    package=$("$MESH" -c 'import importlib.util as u; print(u.find_spec("mediapipe").submodule_search_locations[0])')
    mkdir -p "$OUT/mesh"
    cp "$package"/modules/face_landmark/face_landmark.tflite "$package"/modules/iris_landmark/iris_landmark.tflite "$OUT/mesh"
    python train_ae.py --preset tiny --decoder-only --mesh "$OUT/mesh" --init "$ae" --data "${stage1[@]}" synthetic \
        --blend 0.5 --lr 4e-4 --muon-lr 8e-3 --steps "${MESH_STEPS:-2000}" --out "$OUT/ae-decoder"
    python train_ae.py --preset tiny --mesh "$OUT/mesh" --init "$OUT/ae-decoder/semo.safetensors" --data "${stage1[@]}" synthetic \
        --blend 0.5 --lr 1.5e-4 --muon-lr 3e-3 --steps "${MESH_STEPS:-1200}" --out "$OUT/ae-both"
    ae="$OUT/ae-both/semo.safetensors"
fi

# 5. Stage 2, the motion generator, on the tokens of the frozen encoder; the emotion of voices is learned at its start.
python train_gen.py --preset tiny --data "${sets[@]}" synthetic --ae "$ae" --steps "${GEN_STEPS:-6000}" --out "$OUT/gen"
weights="$OUT/gen/semo.safetensors"

# 6. Judge them on persons and recordings that training never saw. With MESH, real mouths are read from the frames.
python sample.py --img examples/portrait.png --wav examples/speech.wav --ckpt "$weights" --out "$OUT/sample.mp4"
python -m measure.evaluate reconstruct --ckpt "$weights" --json "$OUT/world-reconstruct.json"
python -m measure.evaluate talk --ckpt "$weights" --json "$OUT/world-talk.json"
python -m measure.evaluate probe --ckpt "$weights" --json "$OUT/world-probe.json"
for folder in "${sets[@]}"; do
    grep -q '"split": "test"' "$folder/manifest.jsonl" || continue      # one person in twenty; a small folder may have none
    for command in reconstruct talk; do
        python -m measure.evaluate "$command" --ckpt "$weights" --data "$folder" ${MESH:+--landmarks "$MESH"} \
            --json "$OUT/$(basename "$folder")-$command.json"
    done
done
