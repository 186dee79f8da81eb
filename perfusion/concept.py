"""A trained concept: what its file holds, and how it is put into a pipeline.

    concept = Concept.load("concept.safetensors")
    concept.attach(pipe)                       # a stock diffusers pipeline
    pipe("a photo of <cat*> on the beach")

A file is whole: neither the pictures nor the captions that it was trained with are needed to use it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from perfusion.backbones import around
from perfusion.backbones.base import Backbone
from perfusion.card import model_card
from perfusion.concept_file import (
    FORMAT_VERSION,
    ConceptFileError,
    check_finite,
    check_number,
    entry,
    read,
    settings,
    texts,
    words,
)
from perfusion.config import ConfigError
from perfusion.covariance.configured import spelled_out
from perfusion.editing import EditError
from perfusion.editing.gate import PromptGate
from perfusion.editing.layer import gates_at
from perfusion.files import PathLike, atomic_path
from perfusion.hub import CONCEPT, SAMPLES, download, upload
from perfusion.methods.base import Dial, Method, Word, build, method_class
from perfusion.provenance import provenance

CONVERTED = "perfusion-pytorch"  # package whose concepts can be converted; they say so in `covariance`, before a ":"
LIBRARIES = ("perfusion", "torch", "diffusers", "transformers")  # whose versions a file tells
_ENTRIES = (  # of a file's metadata, in their order
    *("method", "superclass", "placeholder", "settings", "fingerprint", "fingerprint_bfloat16", "covariance", "seed"),
    *("versions", "commit"),
)
_COMMIT_DIGITS = 12
_HASH_DIGITS = 12


class DialError(ConfigError, AttributeError):
    """A setting that a concept's method does not have."""


@dataclass(frozen=True, eq=False)
class Concept:
    """A trained concept, apart from any pipeline."""

    method: str  # module of perfusion.methods
    superclass: str
    placeholder: str
    tensors: Mapping[str, Tensor]  # the method's state, in the dtype of the file
    settings: Mapping[str, Any]  # the method's options, without its name
    fingerprint: Mapping[str, str]  # what it needs of a backbone: Backbone.fingerprint and the set of prompt templates
    covariance: str  # what C was made of (Backbone.covariance), to tell which concepts share one; empty: none needed
    seed: int
    versions: Mapping[str, str]
    commit: str  # of this project; empty outside a checkout
    source: str = "the concept"  # what error messages call it: the path of a file that was loaded
    # The digests in `fingerprint`, had the weights been loaded in bfloat16; empty in files that do not tell.
    fingerprint_bfloat16: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, method: Method, backbone: Backbone, seed: int) -> Concept:
        """The concept that `method`, attached to `backbone`, has now; float32."""
        made = provenance()
        return cls(
            method=method.options.name,
            superclass=method.word.superclass,
            placeholder=method.word.placeholder,
            tensors=method.state(),
            settings=method.settings,
            fingerprint=_requirements(backbone),
            fingerprint_bfloat16={
                part: digest
                for part, digest in backbone.fingerprint(torch.bfloat16).items()
                if part not in backbone.kind()
            },
            covariance=backbone.covariance if method.needs_covariance else "",
            seed=seed,
            versions={name: made["versions"][name] for name in LIBRARIES if name in made["versions"]},
            commit=(made["git_commit"] or "")[:_COMMIT_DIGITS],
        )

    @classmethod
    def load(cls, path: PathLike) -> Concept:
        """Read a concept file, without any model.

        Raises:
            ConceptFileError: the file cannot be read (see `perfusion.concept_file.read`), its metadata is incomplete,
                or something in it is not what a concept has.
        """
        tensors, metadata = read(path)
        placeholder, superclass = words(path, metadata)
        fingerprint = texts(path, metadata, "fingerprint")
        if fingerprint.get("family") == "toyland":
            fingerprint = {"world": "1", **fingerprint}  # Toyland's files began to name their world with the second
        rounded = "fingerprint_bfloat16"
        return cls(
            method=entry(path, metadata, "method"),
            superclass=superclass,
            placeholder=placeholder,
            tensors=tensors,
            settings=settings(path, metadata),
            fingerprint=fingerprint,
            fingerprint_bfloat16=texts(path, metadata, rounded) if rounded in metadata else {},
            covariance=entry(path, metadata, "covariance"),
            seed=entry(path, metadata, "seed", int),
            versions=texts(path, metadata, "versions"),
            commit=entry(path, metadata, "commit"),
            source=str(path),
        )

    @classmethod
    def from_pretrained(
        cls,
        name: PathLike,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: PathLike | None = None,
        local_files_only: bool = False,
    ) -> Concept:
        """Read a concept from the Hugging Face hub, or from a folder with a `concept.safetensors`.

        What is downloaded is a stranger's file, and goes through the checks of `load`.

        Args:
            name: `owner/name` on the hub, or a folder.
            revision: branch, tag or commit; None: the latest.
            token: None: that of the login of huggingface_hub, if there is one; it is not stored.
            cache_dir: None: the hub's own cache.
            local_files_only: do not ask the hub.

        Raises:
            HubError: no such repository, none that may be read, no concept in it, or no network.
            ConceptFileError: see `load`.
        """
        folder = Path(name).expanduser()
        if folder.is_dir():
            return cls.load(folder / CONCEPT)
        return cls.load(download(str(name), revision, token, cache_dir, local_files_only))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,
        samples: bool = False,
        private: bool = True,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Put the concept into a repository of the Hugging Face hub, with a card, and return the commit's address.

        A repository that is not there is made, for nobody else to see. One that is there stays as visible as it is, and
        keeps its card: what somebody wrote into it is not replaced.

        Args:
            repo_id: `owner/name`.
            license: what others may do with it: an identifier of the hub, such as `cc-by-4.0`; None: it is not named.
            samples: take along the `samples.png` beside the file that the concept was loaded from, if there is one. A
                training's has a picture in it that the concept was trained on.
            private: of a new repository; False: everybody can read it.
            token: None: that of the login of huggingface_hub (`hf auth login`); it is not stored.
            revision: branch; None: the main one.
            commit_message: None: one that names the concept's hash.

        Raises:
            HubError: the hub cannot be reached, or does not allow it.
        """
        sheet = Path(self.source).parent / SAMPLES
        pictures = {SAMPLES: sheet.read_bytes()} if samples and sheet.is_file() else {}
        dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in self.tensors.values()))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / CONCEPT
            save_concept(file, self, dtype)
            return upload(
                repo_id,
                {CONCEPT: file.read_bytes(), **pictures},
                self.card(repo_id, license, bool(pictures)),
                commit_message or f"Concept {self.hash}",
                private,
                token,
                revision,
            )

    def card(self, repo_id: str | None = None, license: str | None = None, samples: bool = False) -> str:
        """The model card, as Markdown: what the concept is and how it is used; see `perfusion.card.model_card`."""
        kinds = ("family", "prompts")
        numbers = sum(tensor.numel() for tensor in self.tensors.values())
        facts = {
            "method": self.method,
            "superclass": self.superclass,
            "backbone": self.family,
            "fingerprint of its weights": ", ".join(
                f"{part} {digest}" for part, digest in self.fingerprint.items() if part not in kinds
            ),
            "settings": ", ".join(f"{key} {value}" for key, value in self.settings.items()),
            "made with": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "numbers": f"{numbers:,}",
            "hash": self.hash,
        }
        known = {name: text for name, text in facts.items() if text}
        return model_card(self.placeholder, self.superclass, self.method, self.family, known, repo_id, license, samples)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the sha256 over names, dtypes, shapes and bytes of the tensors."""
        total = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name].detach().cpu().contiguous()
            total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            total.update(tensor.flatten().view(torch.uint8).numpy().data)
        return total.hexdigest()[:_HASH_DIGITS]

    @property
    def family(self) -> str:
        """The kind of backbone that it was trained on, such as `stable_diffusion`."""
        return self.fingerprint.get("family", "toyland")

    @property
    def converted(self) -> bool:
        """Whether another package trained it, of which neither settings nor seed are known."""
        return self.covariance.startswith(f"{CONVERTED}:")

    @property
    def dials(self) -> Mapping[str, Dial]:
        """What can be set while it draws, by name. Raises ConceptFileError for a method that is not known."""
        with self._usable():
            return {dial.name: dial for dial in method_class(self.method).dials}

    def rounded(self, dtype: torch.dtype) -> Concept:
        """This concept with its tensors in `dtype`."""
        return dataclasses.replace(self, tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})

    def attach(self, pipe: DiffusionPipeline | Backbone, **dials: Any) -> Attached:
        """Put the concept into a stock pipeline, for drawing: prompts may hold its placeholder until `detach()`.

        The weights must be those that it was trained with, but may be loaded in another dtype: float32 takes what was
        trained in any, and what was trained in float32 fits any.

        Several concepts that were trained apart may be attached at once, each with a placeholder and strength of its
        own; the order does not matter, and they may leave in any order.

        Everything is checked before the pipeline is touched. `dials` are those of the concept's method: `beta`, `tau`
        and `key_lock` (local or global) of Perfusion, `scale` of LoRA; None is the value that the concept's settings
        name. They can be changed later.

        Raises:
            DialError: the concept's method has no such dial.
            ConceptFileError: the concept is not made for this backbone, or with another covariance than one that is
                attached; its tensors do not fit its method, or this version of perfusion does not know its method or
                settings.
            TokenError: the placeholder is a word of the pipeline already, perhaps because it is attached.
            EditError: something is attached that edits the same projections and cannot be combined with it, such as a
                concept in training; or β or τ is impossible; or the weights are away (sequential offloading).
            BackboneError: no backbone fits the pipeline.
        """
        dials = {name: value for name, value in dials.items() if value is not None}
        for name in dials:
            self.check_dial(name)
        backbone = pipe if isinstance(pipe, Backbone) else around(pipe)
        _check_weights_are_there(backbone)
        self._check_backbone(backbone)
        self._check_company(backbone)
        method = self._build().eval()
        with self._usable():
            self._check_tensors(method, backbone)
        backbone.check_token(self.placeholder, self.superclass)
        with ExitStack() as undo:
            undo.callback(method.detach)
            with self._usable():
                method.attach(backbone)
            method.load_state({name: tensor.float() for name, tensor in self.tensors.items()})
            if isinstance(gate := getattr(method, "gate", None), PromptGate):
                gate.covariance, gate.source = self.covariance, self.source
            method.requires_grad_(False)
            attached = Attached(self, method, backbone)
            for name, value in dials.items():
                setattr(attached, name, value)
            undo.pop_all()
        return attached

    def check_dial(self, name: str) -> None:
        """Hold that `name` can be set while it draws. Raises DialError."""
        if name not in self.dials:
            others = f"it has {' and '.join(self.dials)}" if self.dials else "its strength cannot be set"
            raise DialError(
                f"{name}: found a concept of the method {self.method!r}, which has no {name}; {others} ({self.source})"
            )

    def _build(self) -> Method:
        with self._usable():
            method = build({"name": self.method, **self.settings}, Word(self.placeholder, self.superclass))
        for name, value in vars(method.options).items():  # of which text may have become a number
            if isinstance(value, (int, float)):
                check_number(self.source, f"metadata 'settings': {name}", value)
        return method

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Say of which file a method or setting is that does not exist, or that this model cannot have."""
        try:
            yield
        except ConfigError as error:
            raise ConceptFileError(f"{self.source}: this version of perfusion cannot use it: {error}") from error

    def _check_backbone(self, backbone: Backbone) -> None:
        found = _requirements(backbone)
        for part in dict.fromkeys(("family", *self.fingerprint, *found)):
            wanted, present = self.fingerprint.get(part, "none"), found.get(part, "none")
            if wanted == present or present == self.fingerprint_bfloat16.get(part):
                continue
            if wanted == backbone.fingerprint(torch.bfloat16).get(part):
                continue  # trained in bfloat16
            if part == "world":
                raise ConceptFileError(
                    f"{self.source}: made for Toyland's world {wanted}, found world {present}: train the concept anew"
                )
            message = f"{self.source}: made for another backbone: found {part} {present}, expected {wanted}"
            if part not in ("family", "prompts") and backbone.dtype != torch.float32:
                dtype = str(backbone.dtype).removeprefix("torch.")
                message += f"; in {dtype} the same weights may differ by rounding, dtype=float32 tells"
            if part == "projections":
                message += "; where a LoRA is fused into them: attach before fusing"
            raise ConceptFileError(message)

    def _check_company(self, backbone: Backbone) -> None:
        for other in gates_at(backbone.edit_sites()[0]) if self.covariance else ():
            if other.covariance and not _same(self.covariance, other.covariance):
                raise ConceptFileError(
                    f"{self.source}: found the covariance {spelled_out(self.covariance)}, expected "
                    f"{spelled_out(other.covariance)}, that of {other.source}, which is attached: concepts that are "
                    "drawn together must be trained with the same"
                )

    def _check_tensors(self, method: Method, backbone: Backbone) -> None:
        expected = method.state_shapes(backbone)
        for name in dict.fromkeys((*expected, *self.tensors)):
            if name not in self.tensors:
                raise ConceptFileError(f"{self.source}: found no tensor {name!r}, expected one {expected[name]}")
            found = tuple(self.tensors[name].shape)
            if name not in expected:
                raise ConceptFileError(
                    f"{self.source}: found a tensor {name!r} {found}, expected only {', '.join(expected)}"
                )
            if found != expected[name]:
                raise ConceptFileError(
                    f"{self.source}: tensor {name!r}: found shape {found}, expected {expected[name]} on this backbone"
                )
        if wrong := method.unusable(self.tensors):
            raise ConceptFileError(f"{self.source}: {wrong}")


def save_concept(path: PathLike, concept: Concept, dtype: torch.dtype = torch.float16) -> Concept:
    """Write a concept file atomically, making its folder where there is none; gives the concept as the file holds it,
    rounded to `dtype`.

    Raises:
        ConceptFileError: a value is not finite in `dtype`; nothing is written then.
    """
    concept = concept.rounded(dtype)
    check_finite(path, concept.tensors)
    metadata: dict[str, str] = {"format_version": str(FORMAT_VERSION)}
    for name in _ENTRIES:
        value = getattr(concept, name)
        plain = isinstance(value, str)
        metadata[name] = value if plain else json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in concept.tensors.items()}
        save_file(contiguous, temporary, metadata)
    return dataclasses.replace(concept, source=str(path))


class Attached:
    """A concept inside a pipeline: for `with`, or until `detach()`. Nothing happens when this object is dropped.

    The dials of the concept's method are attributes of this object: `attached.beta = 0.6`. Other names: DialError.
    """

    concept: Concept
    method: Method
    backbone: Backbone

    def __init__(self, concept: Concept, method: Method, backbone: Backbone) -> None:
        vars(self).update(concept=concept, method=method, backbone=backbone)

    @property
    def dials(self) -> dict[str, Any]:
        """What all dials are set to."""
        return {name: getattr(self.method, name) for name in self.concept.dials}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.concept.check_dial(name)
        return getattr(self.method, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.concept.check_dial(name)
        setattr(self.method, name, value)

    def detach(self) -> None:
        """Leave the pipeline bit-identical to before `attach`; idempotent."""
        self.method.detach()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()


def _same(one: str, other: str) -> bool:
    """Whether two concepts were trained with one C, by what they say of it: the C of a converted concept may have been
    given to trainings of this project as a matrix, without a ridge."""
    return one == other or f"matrix@{one}:0" == other or one == f"matrix@{other}:0"


def _check_weights_are_there(backbone: Backbone) -> None:
    for part in (backbone.denoiser, *backbone.text_encoders().values()):
        if any(parameter.is_meta for parameter in part.parameters()):
            raise EditError(
                f"found a {type(part).__name__} whose weights are away, as enable_sequential_cpu_offload() leaves it, "
                "expected them in memory: attach before it, or after pipe.remove_all_hooks()"
            )


def _requirements(backbone: Backbone) -> dict[str, str]:
    """What must be the same where a concept is trained and where it is used. The templates are part of it: methods take
    the superclass's encoding from them."""
    return {**backbone.fingerprint(), "prompts": backbone.config.prompts}
