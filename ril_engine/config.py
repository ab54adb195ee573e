"""Every setting of the engine, with its default, once. config_file.py reads them."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

OpenShare = Annotated[float, Field(gt=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switches(cls, given: object) -> object:
        """Python's True is a 1, and would be taken for a number."""
        for name, value in given.items() if isinstance(given, dict) else ():
            annotation = cls.model_fields[name].annotation if name in cls.model_fields else bool
            if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
                raise ValueError(f"{name} is {str(value).lower()}, but no switch: give its value")
        return given


class DigitsConfig(Section):
    """The embedded task, used when data.dir is "digits"."""

    seed: int = Field(0, description="of the split by source digit, the pictures and the tiny models' weights")
    train_questions: Count = Field(4000, description="questions of the RIL loop")
    validation_questions: Count = Field(1000, description="questions that settings may be chosen on")
    test_questions: Count = Field(2000, description="held-out questions, reported only")
    validation_digits: Count = Field(200, description="source digits only seen in validation pictures")
    test_digits: Count = Field(400, description="source digits only seen in test pictures")
    sft_questions: Count = Field(12000, description="rows of instruction data")
    sft_perception_share: Share = Field(0.2, description="of the SFT rows that only ask for the digits")
    sft_reasoned_share: Share = Field(0.1, description="of the student's other SFT rows that reason; the rest is terse")


class DataConfig(Section):
    dir: str = Field(
        "digits",
        min_length=1,
        description='"digits", or a folder with train.jsonl, validation.jsonl, test.jsonl and, where sft.steps > 0, '
        "sft.jsonl; a line holds id, question, answer, and optionally image (a path inside the folder) or images and "
        "kind; sft.jsonl also response; or instead of them Parquet files of the same columns",
    )
    digits: DigitsConfig = DigitsConfig()
    max_image_pixels: Count = Field(4096 * 4096, description="larger images are refused")


class ModelConfig(Section):
    path: str = Field(
        "tiny:student",
        min_length=1,
        description="a Hugging Face checkpoint (folder or hub name) of an image-text-to-text model; "
        '"tiny:NAME" is a model built here for the digits task',
    )
    trust_remote_code: bool = Field(False, description="run code that the checkpoint brings")

    @field_validator("path")
    @classmethod
    def _known(cls, path: str) -> str:
        from ril_engine.tiny_models import RECIPES  # which reads this file

        known = [f"tiny:{name}" for name in RECIPES]
        if path.startswith("tiny:") and path not in known:
            raise ValueError(f"got {path!r}, no such tiny model, expected {', '.join(known)} or a checkpoint")
        return path


class ServerConfig(Section):
    """An OpenAI-compatible server, such as vLLM's or SGLang's, that generates in place of a checkpoint loaded here."""

    url: str = Field(description="base address, such as http://host:8000/v1")
    model: str = Field(min_length=1, description="the name that the server knows the model by")
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the API key")
    concurrency: Count = Field(16, description="requests under way at once")
    timeout_s: Positive = Field(120.0, description="of one attempt, from connecting to the last byte")
    attempts: Count = Field(5, description="per request, with growing pauses in between")
    max_response_bytes: Count = Field(2**20, description="a larger response is refused and reported")

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        parts = urlsplit(url)
        if "@" in parts.netloc or parts.query or parts.fragment:  # never shown: it may hold a password or a key
            raise ValueError(
                "expected a base such as http://host:8000/v1 without user, query or fragment; a key belongs into the "
                "environment variable that api_key_env names"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"got {url!r}, expected a base such as http://host:8000/v1")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):  # never shown: it may be the key
            raise ValueError(
                "expected the name of an environment variable, of letters, digits and _; export the key in one and "
                "name it here"
            )
        return name


def _require_one_source(what: str, path: str, trust_remote_code: bool, others: dict[str, object]) -> None:
    """A checkpoint of its own, or one of the `others`."""
    named = [name for name, value in others.items() if value is not None]
    if not path and not named:
        raise ValueError(f"{what} has neither {' nor '.join(['path', *others])}: give one of them")
    got = (["path"] if path else []) + (["trust_remote_code"] if trust_remote_code and named else []) + named
    if len(got) > 1:
        raise ValueError(f"{what} has {' and '.join(got)}: remove all but one of them")


class TeacherConfig(ModelConfig):
    """A checkpoint at `path`, a model behind a `server`, or a file of `responses` made elsewhere."""

    name: str = Field(description="as it appears in responses and metrics", pattern=r"^[A-Za-z0-9_.-]+$")
    path: str = Field(
        "",
        description='a checkpoint, as the student\'s, or "tiny:qwen_teacher" or "tiny:internvl_teacher"; none with a '
        "server or a file",
    )
    server: ServerConfig | None = Field(None, description="generates the responses; nothing is loaded here then")
    responses: Path | None = Field(
        None,
        description="JSONL of responses made elsewhere, one a line: id (of the question), text and optionally "
        "truncated; nothing is generated then",
    )
    weight: Positive = Field(1.0, description="of its share of a question's teacher responses, relative to the others'")

    @model_validator(mode="after")
    def _one_source(self):
        others = {"server": self.server, "responses": self.responses}
        _require_one_source(f"teacher {self.name}", self.path, self.trust_remote_code, others)
        return self

    @field_validator("path")
    @classmethod
    def _known(cls, path: str) -> str:
        from ril_engine.tiny_models import RECIPES  # which reads this file

        teachers = [f"tiny:{name}" for name, (*_, style) in RECIPES.items() if style]
        if path.startswith("tiny:") and path not in teachers:
            raise ValueError(f"got {path!r}, no tiny teacher, expected {', '.join(teachers)} or a checkpoint")
        return path


class VerifierConfig(Section):
    """1 where the response's final answer equals the reference: numbers, units, fractions, choices, words."""

    kind: Literal["verifier"] = "verifier"
    weight: Positive = 1.0


class JudgeConfig(ModelConfig):
    """An LLM that reads question, reference and response and accepts the response or not."""

    kind: Literal["judge"] = "judge"
    weight: Positive = 1.0
    path: str = Field("", description='a causal LM, as the student\'s; "tiny:judge" is one built for the digits task')
    server: ServerConfig | None = Field(None, description="asked instead of a checkpoint loaded here")
    mode: Literal["yes_no", "explain"] = Field(
        "yes_no", description="yes_no: one word; explain: a short reason, then the score, as in the paper"
    )
    max_new_tokens: Count = Field(256, description="of the judge's reply, with explain")
    micro_batch_tokens: Count = Field(8192, description="tokens per forward of a checkpoint loaded here")
    on_failure: Literal["stop", "zero"] = Field(
        "stop", description="of a server that gives no answer: stop with a checkpoint, or count the response as 0"
    )

    @model_validator(mode="after")
    def _one_source(self):
        _require_one_source("a judge", self.path, self.trust_remote_code, {"server": self.server})
        if self.path.startswith("tiny:") and (self.path != "tiny:judge" or self.mode == "explain"):
            got = f"{self.path} with mode {self.mode}"
            raise ValueError(f"got {got}, expected tiny:judge with mode yes_no, the one that learns to grade")
        idle = {"on_failure": self.server is None, "micro_batch_tokens": self.server is not None}
        idle["max_new_tokens"] = self.mode == "yes_no"
        for name in (name for name, without in idle.items() if without):
            if getattr(self, name) != type(self).model_fields[name].default:
                where = f"mode {self.mode}" if name == "max_new_tokens" else "a server" if self.server else "a path"
                raise ValueError(f"{name} has no effect with {where}: remove it")
        return self


class FunctionConfig(Section):
    """A function of the user's: ours (questions, references, responses, **columns) or TRL's (prompts, completions,
    **columns), sync or async, giving a number for each response, or None where it has none."""

    kind: Literal["function"] = "function"
    weight: Positive = 1.0
    function: str = Field(
        description="module:name, imported from the Python path", pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
    )


AnswerRewardConfig = Annotated[VerifierConfig | JudgeConfig | FunctionConfig, Field(discriminator="kind")]


class SupervisedConfig(Section):
    """What all trainings on labelled examples have."""

    steps: int = Field(700, ge=0, description="optimiser steps; 0 skips the stage")
    batch_size: Count = Field(48, description="examples per step over all ranks")
    learning_rate: Positive = Field(1e-5)
    final_learning_rate: float = Field(1e-6, ge=0, description="reached linearly, final_steps before the end")
    warmup_steps: int = Field(0, ge=0)
    final_steps: int = Field(0, ge=0, description="steps at the final learning rate")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: Positive = Field(1.0)

    @model_validator(mode="after")
    def _consistent(self):
        if self.steps and self.warmup_steps + self.final_steps >= self.steps:
            raise ValueError(
                f"warmup_steps {self.warmup_steps} and final_steps {self.final_steps} leave none of {self.steps} steps "
                "in between: lower them or raise steps"
            )
        return self


class TrainingConfig(SupervisedConfig):
    """SFT of the student or of a tiny teacher."""

    micro_batch_size: Count = Field(48, description="examples per forward and rank")


class PretrainConfig(SupervisedConfig):
    """D's training on the saved responses; the weights of the best held-out accuracy are kept."""

    validate_every: Count = Field(20, description="steps between looks at the held-out accuracy")
    patience: Count = Field(5, description="so many looks in a row without a better one end the training")


class SamplingConfig(Section):
    temperature: Annotated[float, Field(ge=1e-4)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: int = Field(50, ge=0, description="0 keeps every token")
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.05
    max_new_tokens: Count = Field(512, description="L, the token limit of a response")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="strings that end a response, which they are cut from"
    )
    batch_size: Count = Field(128, description="responses decoded together on a rank, at most")
    cache_tokens: Count = Field(
        131_072, description="keys and values kept on a rank: a prompt's once, a response's at their limit, for each"
    )


class ResponsesConfig(Section):
    per_question: Count = Field(16, description="N responses per question from the student and from each teacher")
    questions: int = Field(0, ge=0, description="how many training questions get saved responses; 0: all of them")


class DiscriminatorConfig(Section):
    use: Literal["updated", "fixed", "none"] = Field(
        "updated", description="in the RIL loop: trained on, as pre-trained, or no D and no similarity reward"
    )
    pretrain: PretrainConfig = PretrainConfig(steps=200)
    validation_share: OpenShare = Field(0.1, description="of the questions held out to measure D's accuracy")
    objective: Literal["bce", "bradley_terry"] = Field(
        "bce",
        description="bradley_terry: a question's student responses against its teachers' (GAD, arXiv 2511.10643); its "
        "scores are then relative to the mean of the question's",
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="labels are 1 - this and this; bce only")
    temperature: Positive = Field(1.0, description="divides D's logit before the score and the loss")
    max_accuracy: OpenShare | None = Field(None, description="D is updated only while its accuracy is below this")
    similarity_levels: int = Field(
        2, ge=0, description="of the similarity reward: 2 is 1[D < 0.5], k gives k even steps of 1 - D, 0 is 1 - D"
    )
    learning_rate: Positive = Field(1e-6, description="in the RIL loop")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: Positive = Field(1.0)
    instruction: str = Field(
        "Tell who wrote the response: 0 for the teacher, 1 for the student.", description="D's system turn"
    )


class LoraConfig(Section):
    """Low-rank adapters of the student, trained in place of its weights. Its reference is itself without them."""

    rank: Count = 16
    alpha: Positive = Field(32.0, description="what the adapters give is multiplied by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of what the adapters read, in updates")
    target_modules: list[str] | None = Field(
        None, min_length=1, description="names of linear layers, such as q_proj; default: all of the language model"
    )

    @field_validator("target_modules")
    @classmethod
    def _no_head(cls, names: list[str] | None) -> list[str] | None:
        if names is not None and (found := sorted({"lm_head", "embed_tokens"} & set(names))):
            raise ValueError(
                f"got {found[0]}, expected linear layers between embeddings and head, whose own weights the loss and "
                "the generation read: remove it"
            )
        return names


class RLConfig(Section):
    algorithm: Literal["ril", "dr_grpo", "grpo", "sft"] = Field(
        "ril",
        description="ril: with teachers and D; dr_grpo and grpo: the student's own responses, answer reward only; "
        "sft: imitation of the same G saved teacher responses per question, without rewards",
    )
    steps: Count = Field(400)
    questions_per_step: Count = Field(16, description="Q, over all ranks")
    group_size: Count = Field(4, description="G responses of the student per question; ril adds G of the teachers")
    updates_per_step: Count = Field(1, description="mu, of student and D, on the same responses")
    clip_low: Share = 0.2
    clip_high: Positive = 0.2
    beta: float = Field(0.01, ge=0, description="weight of KL(policy || reference)")
    kl_on: Literal["student", "all"] = Field("student", description="whose tokens carry the KL term")
    policy_denominator: Positive | None = Field(
        None, description="of the policy term; default responses x Q x L (grpo: responses x Q)"
    )
    kl_denominator: Positive | None = Field(None, description="of the KL term; default as the policy's, its own tokens")
    importance_cap: Positive | None = Field(
        None,
        description="weigh the student's tokens by the trainer's probability over the sampler's, at most this; None: 1",
    )
    mask_truncated: bool = Field(False, description="drop responses without EOS at the token limit from the loss")
    learning_rate: Positive = 1e-6
    final_learning_rate: float | None = Field(None, ge=0, description="reached linearly; default: constant")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: Positive = 1.0
    packing: Literal["shared", "packed", "padded"] = Field(
        "shared",
        description="shared: responses are packed, with their question (for D its instruction) once for all of them; "
        "packed: each with its own; padded: a row for each response, for families that cannot read packs",
    )
    micro_batch_tokens: Count = Field(
        8192, description="tokens per forward and rank, padding included; a longer sequence gets a forward of its own"
    )
    train_vision_tower: bool = False
    lora: LoraConfig | None = Field(None, description="train adapters of the student, not its weights; {} for defaults")
    save_every: int = Field(50, ge=0, description="steps between checkpoints; 0: only where a signal stops the run")
    keep_checkpoints: Count = Field(2, description="how many of them, the newest")
    max_skipped_steps: Count = Field(
        5, description="steps in a row with an update skipped, since its loss or gradient was not finite; then it stops"
    )
    evaluate_every: int = Field(
        0,
        ge=0,
        description="steps between looks at the accuracy on validation questions; the checkpoint that is best there is "
        "kept besides; 0: none",
    )
    evaluate_questions: Count = Field(256, description="how many of validation.jsonl a look takes, the first ones")
    samples_every: Count = Field(20, description="steps between the sample answers kept for the report")


# What `deepspeed.extra` may hold, and what of it the engine writes itself -> the setting to use instead.
EXTRA = (
    *("aio", "bf16", "checkpoint", "comms_logger", "communication_data_type", "data_types", "dump_state"),
    *("flops_profiler", "gradient_predivide_factor", "memory_breakdown", "prescale_gradients"),
    *("wall_clock_breakdown", "zero_optimization"),
)
OWN = {
    "train_batch_size": "rl.questions_per_step",
    "train_micro_batch_size_per_gpu": "rl.micro_batch_tokens",
    "gradient_accumulation_steps": "rl.micro_batch_tokens",
    "gradient_clipping": "max_grad_norm of rl, sft or discriminator",
    "optimizer": "learning_rate and weight_decay of rl, sft or discriminator",
    "scheduler": "learning_rate and warmup_steps of rl, sft or discriminator",
    "fp16": "deepspeed.bf16",
    "bf16.enabled": "deepspeed.bf16",
    "bf16.check_grad_overflow": None,  # updates that are not finite are left out
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.compute_grad_norm": None,
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_parameters",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
}


class DeepSpeedConfig(Section):
    """Of the student's engine and of D's, in all stages."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="what is divided among the ranks: 1 AdamW's states, 2 gradients too, 3 parameters too"
    )
    bf16: bool = Field(False, description="forwards read bf16 weights; AdamW updates float32 ones")
    gradient_checkpointing: bool = Field(
        False, description="keep what enters a layer, and compute the rest of it again in the backward"
    )
    offload_optimizer: bool = Field(
        False, description="AdamW's states and its work on the host, by DeepSpeed's CPU Adam; zero_stage 1, 2 or 3"
    )
    offload_parameters: bool = Field(
        False, description="parameters on the host until a forward or backward reads them; zero_stage 3"
    )
    offload_idle: bool = Field(
        False,
        description="whichever of student, D and reference idles in a step of the loop waits on the host, but for the "
        "weights that the student samples with; zero_stage 1, 2 or 3",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="further settings of DeepSpeed, by its names, such as {zero_optimization: {overlap_comm: false}}",
    )

    @model_validator(mode="after")
    def _possible(self):
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer is true with zero_stage 0, expected 1, 2 or 3: set zero_stage: 1")
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters is true with zero_stage {self.zero_stage}, expected 3: set zero_stage: 3"
            )
        if self.offload_idle and self.zero_stage == 0:
            raise ValueError("offload_idle is true with zero_stage 0, expected 1, 2 or 3: set zero_stage: 1")
        if self.offload_idle and self.bf16 and self.zero_stage == 1:
            raise ValueError("offload_idle is true with bf16 and zero_stage 1, expected 2 or 3: set zero_stage: 2")
        if self.bf16 and self.zero_stage == 0 and "data_types" in self.extra:
            raise ValueError(
                "extra.data_types is set with bf16 and zero_stage 0, expected 1, 2 or 3: remove one of them"
            )
        for name in ("offload_optimizer", "offload_parameters"):
            if self.offload_idle and getattr(self, name):
                raise ValueError(f"offload_idle and {name} are both true, and DeepSpeed has one at a time: remove one")
        return self

    @field_validator("extra")
    @classmethod
    def _not_its_own(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for path, setting in OWN.items():
            found, *keys = [extra, *path.split(".")]
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if found is not None:
                remedy = "remove it" if setting is None else f"set {setting} instead"
                raise ValueError(f"{path} is {found!r}, but this engine relies on its own: {remedy}")
        for key, value in extra.items():
            if key in ("bf16", "zero_optimization") and not isinstance(value, dict):
                raise ValueError(f"{key} is {value!r}, expected a mapping of DeepSpeed's settings: write it as one")
            if key not in EXTRA:
                (near,) = difflib.get_close_matches(str(key), EXTRA, n=1, cutoff=0)
                raise ValueError(f"unknown key {key}: did you mean {near!r}? (valid: {', '.join(EXTRA)})")
        return extra


class PlanConfig(Section):
    """What `ril plan` takes for a question; the other sizes are those of the sections that it plans."""

    text_tokens: Annotated[int, Field(ge=2)] = Field(128, description="of a question with its chat turns")
    image_tokens: int = Field(1024, ge=0, description="of its picture, after the vision tower; 0: none")


class EvaluationConfig(Section):
    split: Literal["test", "validation"] = Field("test", description="validation while settings are being chosen")
    questions: int = Field(0, ge=0, description="how many of the split's questions; 0: all")


class Config(Section):
    """The whole job. `configs/digits.yaml` is the embedded default."""

    seed: int = Field(0, ge=0)
    work_dir: Path = Field(Path("runs"), description="holds stages/ (reused) and one folder per run")
    min_free_disk_gib: float = Field(1.0, ge=0, description="checked before each stage and each checkpoint")
    data: DataConfig = DataConfig()
    student: ModelConfig = ModelConfig()
    teachers: list[TeacherConfig] = Field(default_factory=list)
    sft: TrainingConfig = TrainingConfig()
    teacher_sft: TrainingConfig = Field(TrainingConfig(), description='training of "tiny:" teachers')
    responses: ResponsesConfig = ResponsesConfig()
    sampling: SamplingConfig = SamplingConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    rl: RLConfig = RLConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    plan: PlanConfig = PlanConfig()
    answer_rewards: list[AnswerRewardConfig] = Field(
        [VerifierConfig()], description="their weighted sum is the answer reward; [] for none"
    )
    on_bad_data: Literal["stop", "skip"] = Field(
        "stop", description="of a question without a reference or a teacher's file with bad rows: stop, or leave it out"
    )

    @model_validator(mode="after")
    def _consistent(self):
        taught = self.rl.algorithm in ("ril", "sft")
        if self.student.path == "tiny:judge":
            raise ValueError("student is tiny:judge, which reads no pictures: give tiny:student or a checkpoint")
        if self.student.path.startswith("tiny:") and not self.sft.steps:
            raise ValueError(
                f"sft.steps is 0, but student.path {self.student.path} is built by that training: raise it or give a "
                "checkpoint"
            )
        self._require_room()
        if taught and not self.teachers:
            raise ValueError(
                f"teachers is empty, but rl.algorithm is {self.rl.algorithm}: name a teacher or set rl.algorithm: "
                "dr_grpo"
            )
        if self.rl.lora is not None and self.rl.train_vision_tower:
            raise ValueError(
                "rl.train_vision_tower is true with rl.lora, whose adapters are of the language model alone: remove "
                "one of them"
            )
        asked = type(self.rl).model_fields["evaluate_questions"].default
        if not self.rl.evaluate_every and self.rl.evaluate_questions != asked:
            raise ValueError(
                f"rl.evaluate_questions is {self.rl.evaluate_questions}, without effect where rl.evaluate_every is 0: "
                "set rl.evaluate_every, or remove it"
            )
        if self.rl.importance_cap is not None and self.rl.algorithm == "sft":
            raise ValueError("rl.importance_cap has no effect with rl.algorithm sft, which samples nothing: remove it")
        imitates = self.rl.algorithm == "sft" or (self.rl.algorithm == "ril" and self.discriminator.use != "none")
        if not self.answer_rewards and not imitates:
            raise ValueError(
                f"answer_rewards is empty and rl.algorithm {self.rl.algorithm} with discriminator.use "
                f"{self.discriminator.use} has no similarity reward: name an answer reward, such as "
                "answer_rewards: [{kind: verifier}]"
            )
        if self.discriminator.similarity_levels == 1:
            raise ValueError("discriminator.similarity_levels is 1, one reward for all: give 0, or 2 or more")
        if self.discriminator.objective != "bce" and self.discriminator.label_smoothing:
            raise ValueError(
                "discriminator.label_smoothing has no effect with objective bradley_terry, which has no labels: remove "
                "one of them"
            )
        updated = self.rl.algorithm == "ril" and self.discriminator.use == "updated"
        if self.discriminator.max_accuracy is not None and not updated:
            raise ValueError(
                f"discriminator.max_accuracy has no effect with use {self.discriminator.use} and rl.algorithm "
                f"{self.rl.algorithm}, which update no D: remove it"
            )
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) < len(names):
            raise ValueError(f"teachers: names must differ, got {names}: rename one")
        if taken := sorted({"student", "teacher", "spread"} & set(names)):
            raise ValueError(f"teachers: the name {taken[0]} is taken, by another's metrics: choose another")
        generated = all(teacher.responses is None for teacher in self.teachers)  # what a file has is known later
        if taught and generated and self.responses.per_question * len(names) < self.rl.group_size:
            raise ValueError(
                f"responses.per_question is {self.responses.per_question} for each of {len(names)} teachers, fewer "
                f"than rl.group_size {self.rl.group_size}: raise responses.per_question"
            )
        if self.rl.group_size < 2 and not taught:
            raise ValueError(
                f"rl.group_size is 1: {self.rl.algorithm} needs at least 2 responses per question: raise it"
            )
        return self

    def _require_room(self) -> None:
        """A question's responses are decoded together, save by families that cannot read packs."""
        counts = {"responses.per_question": self.responses.per_question} if self.rl.algorithm in ("ril", "sft") else {}
        if self.rl.algorithm != "sft":
            counts["rl.group_size"] = self.rl.group_size
        name, most = max(counts.items(), key=lambda item: item[1])
        sampling = self.sampling
        if self.rl.packing == "padded":
            return
        if most > sampling.batch_size:
            raise ValueError(
                f"sampling.batch_size is {sampling.batch_size}, fewer than {name} {most}, which are decoded together: "
                f"raise it or lower {name}"
            )
        if most * sampling.max_new_tokens > sampling.cache_tokens:
            raise ValueError(
                f"sampling.cache_tokens is {sampling.cache_tokens}, fewer than {name} {most} times "
                f"sampling.max_new_tokens {sampling.max_new_tokens}: raise it or lower one of them"
            )
