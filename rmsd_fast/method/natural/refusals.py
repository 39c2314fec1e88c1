"""Responses in which a teacher declines, or says that it has seen no video."""

from __future__ import annotations

import re

_SORRY = (
    r"(?:(?:i['’]?m|i am|we are)\s+(?:very |so |really )?(?:sorry|afraid)|sorry|apologies|unfortunately|regrettably)"
)
_AI = r"as an? (?:ai|large language|language|text)[\w -]{0,30}"
_UNABLE = (
    r"(?:i|we)(?:['’]m|['’]re| am| are)?\s+(?:currently |still |really )?"
    r"(?:can(?:no|['’]?)t|can not|could(?:n['’]?t| not)|unable|not able|do(?:n['’]?t| not) (?:actually )?have"
    r"|am not allowed|won['’]?t)\b"
)
_DECLINES = re.compile(
    rf"(?:(?:{_SORRY}|{_AI})[\s,.!;:—-]*(?:but\s+|that\s+)?){{0,2}}{_UNABLE}\s+(?:to )?"
    r"(?:directly |actually |be able to |the ability |access |any )*(?:to )?"
    r"(?:see|view|watch|access|assist|help|answer|process|analy[sz]e|open|play|provide|give|determine|identify|read|localize"
    r"|localise|the|any)\b"
    r"|(?:很|非常)?(?:抱歉|对不起|不好意思).{0,20}(?:无法|不能|看不|没有|未能)"
    r"|我(?:暂时|目前)?(?:无法|不能|没有办法|看不到|没有看到|看不了)|申し訳.{0,30}(?:ません|ない)"
    r"|lo siento.{0,20}\bno\b|es tut mir leid.{0,40}\b(?:nicht|kein\w*)\b|je suis désolée?.{0,40}\b(?:ne|pas)\b"
    r"|ich (?:kann|sehe|habe) (?:leider )?(?:das |kein)|je ne (?:vois|peux) pas|no (?:veo|puedo)\b",
    re.IGNORECASE,
)
_MEDIUM = (
    r"(?:videos?|images?|pictures?|clips?|frames?|footage|files?|content|media|attachments?|requests?|questions?|text"
    r"|signs?|that|this|视频|图片|画面|内容|问题|文字|動画|画像|imagen|bild|vidéo)"
)
_NO_MEDIUM = re.compile(
    r"(?:(?:i (?:do(?:n['’]?t| not) (?:see|have)|can(?:no|['’]?)t see|see no)|there (?:is no|isn['’]?t any?)|no)\s+"
    r"(?:any |an? |the )?(?:video|image|picture|clip|frame|attachment|file)s?\b[^.!?]{0,40}"
    r"\b(?:attached|provided|included|uploaded|shared|available|in (?:your|this|our) (?:message|chat|conversation))"
    r"|(?:please|could you|can you) (?:upload|share|provide|attach|send|re-?upload)\b"
    r"|(?:未|没有)(?:提供|看到|收到)(?:任何)?(?:视频|图片))",
    re.IGNORECASE,
)


def is_refusal(text: str, *, inside_answer: bool) -> bool:
    """Whether a text begins with a refusal.

    Args:
        inside_answer: the text stands in an answer block, where it may be a line of a film or a description: only a
            refusal that speaks of a medium, a text or a request counts.
    """
    text = text.lstrip(' \n"“*')
    if _NO_MEDIUM.match(text):
        return True
    refusal = _DECLINES.match(text)
    if not refusal or not inside_answer:
        return bool(refusal)
    return bool(re.search(rf"(?<![A-Za-z]){_MEDIUM}(?![A-Za-z])", text[: refusal.end() + 60], re.IGNORECASE))
