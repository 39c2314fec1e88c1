"""Read exports with the transformers of the running interpreter, for tests/models/test_export_versions.py.

The arguments are a job written with torch.save, the path of the results, and the folder that holds torchvision. This
file imports nothing from this repository, because the interpreter belongs to another environment.
"""

import inspect
import logging
import sys

import torch

# As in conftest.TORCHVISION_PRELUDE, a CUDA wheel of torchvision runs together with a CPU build of torch.
sys.path.append(sys.argv[3])
if torch.version.cuda is None:
    ops = torch.library.Library("torchvision", "DEF")
    ops.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    ops.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata


class Collector(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def read_tokenizer(folder, job):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
    return tokenizer, {
        "ids": ids,
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "rendered": [
            tokenizer.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
            for case in job["cases"]
        ],
        "special": {name: getattr(tokenizer, name) for name in job["special"]},
        "length": len(tokenizer),
    }


def read_model(folder, job, end_id):
    words = list(range(256))
    model, info = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    # Versions before 5 determine themselves which tokens are media.
    known = inspect.signature(type(model).forward).parameters
    logits, generated = [], []
    for case in job["cases"]:
        inputs = {name: value for name, value in case["inputs"].items() if name in known}
        length = inputs["input_ids"].shape[1]

        def allowed(_, ids, length=length):
            return words if len(ids) < length + 3 else [end_id]

        with torch.no_grad():
            logits.append(model(**inputs).logits)
            rows = model.generate(**inputs, max_new_tokens=8, do_sample=False, prefix_allowed_tokens_fn=allowed)
        generated.append(rows[0, length:].tolist())
    stored = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    return model, {
        "logits": logits,
        "generated": generated,
        "tied": model.lm_head.weight is model.get_input_embeddings().weight,
        "faults": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]])),
        "stored_dtype": str(stored.dtype),
    }


def read_processor(folder, job):
    processor = AutoProcessor.from_pretrained(folder)
    prompts = []
    for case in job["cases"]:
        text = processor.apply_chat_template(case["messages"], tokenize=False, add_generation_prompt=True)
        metadata = [
            VideoMetadata(total_num_frames=total, fps=fps, frames_indices=list(indices))
            for total, fps, indices in case["metadata"]
        ]
        prompt = processor(
            text=[text],
            videos=case["videos"] or None,
            images=case["images"] or None,
            video_metadata=metadata or None,
            do_sample_frames=False,
            do_resize=False,
            return_tensors="pt",
        )
        prompts.append({name: value for name, value in prompt.items() if torch.is_tensor(value)})
    large = processor.video_processor(videos=[job["large_video"]], do_sample_frames=False, return_tensors="pt")
    return {
        "processor": type(processor).__name__,
        "prompts": prompts,
        "large_grid": large["video_grid_thw"][0].tolist(),
    }


def read(folder, job):
    tokenizer, found = read_tokenizer(folder, job)
    model, of_model = read_model(folder, job, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    if job["save_to"]:
        model.save_pretrained(job["save_to"])
        tokenizer.save_pretrained(job["save_to"])
    return {**found, **of_model, **read_processor(folder, job)}


def main():
    job = torch.load(sys.argv[1])
    collector = Collector()
    logging.getLogger("transformers").addHandler(collector)
    found = [read(folder, {**job, **own}) for folder, own in job["folders"].items()]
    torch.save(
        {"version": transformers.__version__, "folders": found, "warnings": collector.messages},
        sys.argv[2],
    )


main()
