"""Chat templates in the documented form of public model families, with the special tokens of tokenizer_kinds.

They differ in the markers of turns, in what they trim, in the roles that they accept, and in how they render thoughts.
"""

OPEN = "{% if add_generation_prompt %}"
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
ALTERNATE = (
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    + OPEN + "<|im_start|>assistant\n{% endif %}"
)  # fmt: skip

TEMPLATES = {
    "ChatML (Qwen 2.5, Yi)": CHATML,
    "Llama 3": "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}<|user|>\n\n"
    "{{ message.content | trim }}<|eot|>{% endfor %}" + OPEN + "<|im_start|>assistant<|user|>\n\n{% endif %}",
    "Llama 2": SYSTEM_FIRST + "{% for message in turns %}" + ALTERNATE + "{% if message.role == 'user' %}"
    "{{ bos_token }}[INST] {{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first }}"
    "{{ message.content | trim }} [/INST]{% else %} {{ message.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}",
    "Mistral": "{{ bos_token }}" + SYSTEM_FIRST + "{% for message in turns %}" + ALTERNATE
    + "{% if message.role == 'user' %}[INST]{{ ' ' + message.content }}[/INST]{% else %}"
    "{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}",
    "Zephyr": "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content + eos_token }}\n{% endfor %}"
    + OPEN + "<|assistant|>\n{% endif %}",
    "Gemma": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}" + ALTERNATE + "<|im_start|>"
    "{{ 'model' if message.role == 'assistant' else message.role }}\n{{ message.content | trim }}<|im_end|>\n"
    "{% endfor %}" + OPEN + "<|im_start|>model\n{% endif %}",
    "Phi 3": "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|eot|>\n{% endfor %}"
    + OPEN + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "Qwen 3": "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% set thought = message.reasoning_content or '' %}{% set content = message.content %}"
    "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last or thought %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}{{ content.lstrip('\n') }}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}" + OPEN + "<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "GLM 4.5": "{% for message in messages %}{% if message.role == 'assistant' %}<|assistant|>\n"
    "{% set content = message.content %}{% if '</think>' in content %}"
    "<think>{{ content.split('</think>')[0].split('<think>')[-1].strip() }}</think>\n"
    "{{ content.split('</think>')[-1].strip() }}{% else %}<think></think>\n{{ content.strip() }}{% endif %}"
    "{% else %}<|{{ message.role }}|>\n{{ message.content }}{% endif %}{% endfor %}"
    + OPEN + "<|assistant|>\n{% endif %}",
    "Vicuna": "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content | trim }} "
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content | trim }}{{ eos_token }}"
    "{% else %}{{ message.content | trim }} {% endif %}{% endfor %}" + OPEN + "ASSISTANT:{% endif %}",
    "Alpaca": "{% for message in messages %}{% if message.role == 'user' %}### Instruction:\n{{ message.content }}\n\n"
    "{% elif message.role == 'assistant' %}### Response:\n{{ message.content }}\n\n{% else %}{{ message.content }}\n\n"
    "{% endif %}{% endfor %}" + OPEN + "### Response:\n{% endif %}",
    "DeepSeek": "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% elif message.role == 'assistant' %}<|assistant|>{{ message.content }}{{ eos_token }}{% else %}"
    "{{ message.content }}{% endif %}{% endfor %}" + OPEN + "<|assistant|>{% endif %}",
}  # fmt: skip
NO_SYSTEM = ("Gemma",)
# the token that ends a completion: the template's end of turn, or the tokenizer's end of sequence
ENDS = dict.fromkeys(TEMPLATES, "</s>") | {
    "ChatML (Qwen 2.5, Yi)": "<|im_end|>", "Llama 3": "<|eot|>", "Gemma": "<|im_end|>", "Qwen 3": "<|im_end|>",
    "Phi 3": "<|eot|>",
}  # fmt: skip
