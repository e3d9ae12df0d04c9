"""Models and tokenizers: the only package that knows transformers.

Everything else sees a torch module, its config and a tokenizer.
"""

from exo.models.attention.flex import attend
from exo.models.classifiers import classifier_from, classifier_without_weights, load_classifier
from exo.models.files import is_adapter
from exo.models.loading import check_fits, dequantize, load, load_or_tiny, load_tokenizer, parameter_count
from exo.models.meta import load_without_weights, parameters_of
from exo.models.saving import Dtypes, dtypes_of, export_model, save
from exo.models.stop_tokens import absent_ids, stop_ids
from exo.models.supported import refuse_unsupported
from exo.models.tiny_models import PAD, tiny, word_level

__all__ = ["PAD", "Dtypes", "absent_ids", "attend", "check_fits", "classifier_from", "classifier_without_weights"]
__all__ += ["dequantize", "dtypes_of", "export_model", "is_adapter", "load", "load_classifier", "load_or_tiny"]
__all__ += ["load_tokenizer", "load_without_weights", "parameter_count", "parameters_of", "refuse_unsupported", "save"]
__all__ += ["stop_ids", "tiny", "word_level"]
