# Every share and seed of sharing.yaml, then Caltech-101 added on the frozen shared part. What is done or recorded is skipped.
# SEEDS="0 2" or SHARES="0 0.5" does these only, so that two can run side by side.
set -e
study=benchmarks/studies/sharing.yaml
for seed in ${SEEDS:-0 1 2}; do
  for share in ${SHARES:-0 0.25 0.5 0.75 1}; do
    grep -qs "\"share-$share-seed-$seed\"" benchmarks/studies/results/sharing.jsonl && continue
    out=runs/sharing/share-$share-seed-$seed
    fewtune fit-many $study share=$share seed=$seed --out $out --json
    fewtune fit-many $study share=$share seed=$seed tasks.caltech.data=images/caltech101 --out $out --json
  done
done
