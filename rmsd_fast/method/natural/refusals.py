"""Detect responses in which a teacher declines to answer or says that it has not seen a video."""

from __future__ import annotations

import re

_SORRY = (
    r"(?:(?:i['’]?m|i am|we are)\s+(?:very |so |really )?(?:sorry|afraid)|sorry|apologies|i apologi[sz]e|my apologies"
    r"|unfortunately|regrettably)"
)
_AI = r"as an? (?:ai|large language|language|text)[\w -]{0,30}"
_POLITE = rf"(?:(?:{_SORRY}|{_AI})[\s,.!;:—-]*(?:but\s+|that\s+)?){{0,2}}"
_UNABLE = (
    r"(?:i|we)(?:['’]m|['’]re| am| are)?\s+(?:currently |still |really )?"
    r"(?:can(?:no|['’]?)t|can not|could(?:n['’]?t| not)|unable|not able|do(?:n['’]?t| not) (?:actually )?have"
    r"|am not allowed|won['’]?t)\b"
)
_WHAT = r"(?:directly |actually |be able to |the ability |access |any )*(?:to )?"
_DECLINES = re.compile(
    rf"{_POLITE}{_UNABLE}\s+(?:to )?{_WHAT}"
    r"(?:see|view|watch|access|assist|help|answer|process|analy[sz]e|open|play|provide|give|determine|identify|read"
    r"|localize|localise|comply|describe|the|any|eyes)\b|(?:很|非常)?(?:抱歉(?!的)|对不起|不好意思).{0,20}(?:无法|不能|看不|没有|未能)"
    r"|(?:作为.{0,20}[，,\s])?我(?:暂时|目前)?(?:无法|不能|没有办法|看不到|没有看到|看不了)|申し訳.{0,30}(?:ません|ない)"
    r"|lo siento.{0,20}\bno\b|es tut mir leid.{0,40}\b(?:nicht|kein\w*)\b|je suis désolée?.{0,40}\b(?:ne|pas)\b"
    r"|ich (?:kann|sehe|habe) (?:leider )?(?:das |kein)|je ne (?:vois|peux) pas|no (?:veo|puedo)\b",
    re.IGNORECASE,
)
# Phrases of a teacher that a person in a film would not say, regardless of what follows.
_SURE = re.compile(
    rf"{_POLITE}{_UNABLE}\s+(?:to )?{_WHAT}(?:comply|determine|assist with|process|analy[sz]e)\b"
    rf"|{_AI},?\s+i\b|作为.{{0,8}}(?:AI|人工智能|语言模型)"
    r"|(?:the )?(?:video|image|clip|file)s? (?:could not|couldn['’]t|cannot|can['’]t) be (?:loaded|opened|played"
    r"|processed)(?=\W*$|[.!]\s)"
    r"|(?:the )?(?:video|image|clip|file)s? (?:did(?: not|n['’]t)|does(?: not|n['’]t)|failed to) (?:load|play|open)"
    r"(?=\W*$|[.!]\s)"
    r"|without (?:access to|seeing|being able to (?:see|view|watch)) (?:the|your) (?:video|image|clip|frames?)\b",
    re.IGNORECASE,
)
# Texts that are a refusal only if they are the whole answer.
_WHOLE = re.compile(
    rf"{_POLITE}(?:{_UNABLE}|i (?:must|have to) decline)(?: to (?:answer|assist|help))?\W*|i (?:must"
    rf"|have to) decline\W.*"
    r"|error\s*:.{0,80}|no (?:video|image)s? found\W*|video unavailable\W*|\W*no answer\W*|none\W*|unknown\W*"
    r"|i (?:do not|don['’]t) know\W*|i(?:['’]m| am) not sure\W*|(?:it )?(?:cannot|can['’]t)(?: be)? determined?\W*"
    r"|unable to (?:determine|answer|tell)\W*|(?:there is )?(?:not enough|insufficient) information\b.{0,40}|null|n/a"
    r"|视频无法加载\W*|お答えできません\W*|无法(?:判断|确定|回答|得知)\W*",
    re.IGNORECASE,
)
# "I can't see the sign", says the old man.
_SPEECH = re.compile(r"[,\"”]\s*(?:says|said|shouts|asks|replies|whispers)\b|\b(?:says|said) the\b", re.IGNORECASE)
_MEDIUM = (
    r"(?:videos?|images?|pictures?|clips?|frames?|footage|files?|content|media|attachments?|requests?|questions?|text"
    r"|signs?|that|this|视频|图片|画面|内容|问题|文字|動画|画像|imagen|bild|vidéo)"
)
_FILE = r"(?:video|image|picture|clip|frame|attachment|file)s?"
_MISSING = (
    r"(?:it (?:appears|seems|looks)(?: like)?(?: that)? )?(?:i (?:do(?:n['’]?t| not) (?:see|have)|can(?:no"
    r"|['’]?)t see|see no)"
    rf"|there (?:is no|isn['’]t any?)|no)\s+(?:any |an? |the )?{_FILE}\b[^.!?;]{{0,40}}"
)
_ASKS = r"(?:please|could you(?: please)?|can you(?: please)?)"
_NO_MEDIUM = re.compile(
    rf"{_MISSING}\b(?:attached|provided|included|uploaded|shared|available)"
    r"(?: (?:in|with|to) (?:your|this|our|the) (?:message|chat|conversation|request|question|prompt))?\s*(?:[.!]|$)"
    rf"|{_MISSING}in (?:your|this|our) (?:message|chat|conversation)"
    rf"|{_ASKS} (?:upload|share|provide|attach|send|re-?upload)\b(?=.*\b(?:i|me|again|here|chat)\b)(?=.*\b(?:{_FILE}"
    rf"|it)\b)"
    rf"|{_ASKS} (?:upload|provide|attach|re-?upload) (?:the|a|your) {_FILE}\W*$"
    r"|(?:未|没有)(?:提供|看到|收到)(?:任何)?(?:视频|图片)",
    re.IGNORECASE | re.DOTALL,
)
# "No image available" may be a text in a picture.
_SHOWN = re.compile(rf"no {_FILE} (?:available|provided|found)\W*", re.IGNORECASE)


def is_refusal(text: str, *, task: str, inside_answer: bool) -> bool:
    """Return whether a text begins with a refusal.

    Args:
        text: the response, or the content of its answer block.
        task: one of TASK_TYPES.
        inside_answer: the text is in an answer block, where it may be a line of a film or a description. Only a refusal
            that mentions a medium, a text or a request counts there.
    """
    text = text.lstrip(' \n"“*')
    if _SPEECH.search(text[:200]) or (task == "ocr" and _SHOWN.fullmatch(text)):
        return False
    if _NO_MEDIUM.match(text) or (task != "ocr" and (_SURE.match(text) or _WHOLE.fullmatch(text))):
        return True
    refusal = _DECLINES.match(text)
    if not refusal or not inside_answer:
        return bool(refusal)
    return bool(re.search(rf"(?<![A-Za-z]){_MEDIUM}(?![A-Za-z])", text[: refusal.end() + 60], re.IGNORECASE))
