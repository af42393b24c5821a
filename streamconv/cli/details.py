"""What `--help` says after the flags: details that a user needs once, in paragraphs."""

from __future__ import annotations

SOURCES = """What MODEL may be: a Hugging Face folder (safetensors or .bin shards), one .safetensors file, a Meta folder
(consolidated.*.pth and params.json), or a model of the Hub as org/name, org/name@revision or hf://org/name[@revision]. A local
folder of that name wins. Shards may be links to anywhere.

model.safetensors counts before shards and their index file; where index file and shards disagree, the shards count. Prefixes around
all names (_orig_mod., module., base_model.model., any other) are removed where that is safe; rotary buffers are ignored; a tied
model may store lm_head alone. Of LLaVA, LLaVA-NeXT and Mistral-3 the language model is converted. Of rope_theta in two places the
one inside rope_parameters counts. A quantization config whose model holds floats only is left over from a merge. Each of these is a
warning. LoRA adapters, GGUF, Git LFS pointers and the like are refused by name, with the way out.

--to trtllm imports quantized sources as they are: GPTQ (v1, v2; 4 and 8 bit), AutoAWQ, ModelOpt AWQ and FP8 (with the scales of the
FP8 KV cache) and fbgemm FP8; groups are 64 or 128. --to hf --quant none decodes FP8 (scales of any float type or E8M0), INT8, INT4,
NVFP4, MX, GPTQ (act order too), AutoAWQ and the MXFP4 experts of gpt-oss. --quant keep keeps the codes: alone it copies a quantized
model; --format compressed-tensors takes AutoAWQ, GPTQ in order and ModelOpt NVFP4, --format modelopt takes NVFP4 of
compressed-tensors.

A TensorRT-LLM checkpoint as MODEL: what is not given (format, dtype, ranks, release) stays as it is. Unquantized, INT8, INT4, FP8
rowwise, GPTQ and AutoAWQ ranks become other ranks; INT8, INT4 and FP8 rowwise keep --tp-size, as a rank's scales are those of its own
inputs. --to hf decodes these, FP8 per tensor and W4A16_AWQ too, and --quant keep keeps codes and scales: integers pack-quantized, FP8
in either container, AWQ in ModelOpt's. Names and config are the model's own where streamconv.json has them, else worked out."""

OUTPUT = """OUT appears when it is complete and on the disk. An interrupted run leaves a hidden folder beside OUT; the same command
resumes it. If the source or the flags changed meanwhile, the error says what changed, and --force starts over. A copied or touched
source starts over too. --force replaces a finished output, never a folder that holds anything else, nor a file of the source.

--output TARGET:FOLDER:KEY=VALUE,... in the place of OUT, several times, makes all outputs from one read of the source. Keys are the
options of the target, with _; a flag without a value needs none (rope_tables); modules of a list are joined by + or the key is
repeated; a folder that ends in a colon and an option needs a colon after it. Each output is published for itself, an output that is
finished is skipped. No output may lie in another, or in the source. A recipe has a table [[output]] for each, with out, to and options.

OUT may be a mount point (docker run -v): hidden files in it get their names when all are complete, config.json last. A file system
without locks (Lustre, by default), or one that cannot sync a folder, is refused; --no-lock goes on, and nobody else may write there
meanwhile. On a file system in memory the output counts as memory of the container.

--to trtllm lays INT8 and INT4 out for one GPU generation: --target-sm 70 V100 (0.16), 75 T4, 80 A100, 86 RTX 30 and A10, 89 L4 and
RTX 40, 90 H100, 100 and 103 B200 and B300, 120 and 121 RTX 50. All but 70, 72 and 90 share the layout of sm80, experts on 90 too.
--encoding raw fits every GPU and is larger. --target-version 1.0 is 1.2 without the four keys of config.json that early 1.x releases
reject.

--to hf copies the files beside the weights; README.md becomes a model card. Folders, links out of the model and names that are not
UTF-8 are left out, with a warning. Modules that share an input (q, k and v; gate and up) share its scale; experts that no token
reached take the largest of their layer.

--text with --quant int4_awq or w4a16 searches codes and scales: --method clip, awq or gptq, one decoder layer in memory at a time;
without --method the best that fits, gptq, else clip. --to hf folds the pre-scales of awq into norms (none that a router reads) and the
rows of the layer before; --format awq takes every method. The codes stay in OUT.int4.safetensors; --codes FILE uses them for another
--tp-size and, but for awq, for the other target. The manifest tells the error of each linear layer, rounded to nearest and as found.

--verify inline decodes each tile before it is written; a value farther off than its format allows ends the run (status 7). It
is slow for casts, SmoothQuant and searched scales, which torch decodes instead of a kernel. Of models above 16 GiB convert tells how
long it should take, plan of those above 256 MiB, from half a second's look at the disks.

--parts: a part whose worker died is resumed by another, and starting any of them again does no harm. Workers notice locks that do not
reach other machines: then give each its part, --no-lock --part K/N, and run finalize; or add --private-parts. With several --output
each part reads the source once for each output.

Hub models: a shard is downloaded when the plan reaches it, the next one meanwhile. --hub-keep none removes each shard after its
last use, and only what this run downloaded, so the disk holds OUT and about two shards. Errors 429 (Retry-After up to 60 s) and 5xx
are retried; a cut download resumes."""

RECIPES = """--config takes TOML, YAML or the streamconv.json of a conversion. Keys are the long flags, with - or _, and model and
out; flags typed on the command line win. A recipe may hold options without effect; on the command line one that decides bytes is
refused, and one of resources is noted. --write-config writes every option, and a Hub model by its commit."""

VERIFY = """--source encodes MODEL again, on the CPU, in tiles, and names each tensor that differs: how many bytes, the first row
and by how much. File names and folders of the source do not matter. Largest error, relative error and SNR are those of the first
rows of each matrix. Without streamconv.json the options come from config.json, and the GPU generation is found by trying the
layouts. Rank files of another tool pass with the same bytes, or with values as close to MODEL as the format allows."""

CALIBRATE = """Every sample goes through layer 0, the hidden states wait in a scratch file (on a GPU with room they stay there),
layer 0 is released, layer 1 is read. An interrupted calibration resumes after its last saved layer. --text is a .txt file (samples
separated by blank lines), a .jsonl file, a folder of these, or a data set of the Hub (with the package datasets). convert --text
measures in a process of its own and keeps the ranges in OUT.ranges.safetensors. --memory-budget is an estimate of torch's needs
here, no ceiling. Quantized sources are refused. No code of the model runs, and nothing is fetched once model and text are here.
With ranges, --kv-cache fp8 of convert writes measured factors (at least 1), without them 1; where q, k and v are one tensor (phi3,
internlm2) it stays 1."""

CONVERT, PLAN = "\n\n".join((SOURCES, OUTPUT, RECIPES)), "\n\n".join((SOURCES, RECIPES))
