"""The quiz as one web page that needs no network: two slices side by side, one of them drawn; which?

Choose with a click, or with the left and the right arrow key. At the end the page offers the answers as a file; nothing
is sent anywhere, and what is right stands in another file, the answer sheet.
"""

import base64
import io
import json

from PIL import Image

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: dark; }
body { margin: 0; background: #16181b; color: #e6e6e6; font: 1rem/1.5 system-ui, sans-serif; text-align: center; }
main { max-width: 60rem; margin: 0 auto; padding: 1rem; }
#pair { display: flex; gap: 1rem; justify-content: center; }
#pair button { padding: 0.3rem; border: 3px solid #444; border-radius: 0.4rem; background: #000; width: 46%;
  max-width: 26rem; }
#pair button:hover, #pair button:focus { border-color: #e6e6e6; }
#pair img { width: 100%; display: block; }
textarea { width: 100%; height: 8rem; }
[hidden] { display: none !important; }
"""
SCRIPT = """
const quiz = JSON.parse(document.getElementById("quiz").textContent);
const answers = {};
let now = 0;
function show() {
  const over = now >= quiz.pairs.length;
  document.getElementById("question").hidden = over;
  document.getElementById("end").hidden = now === 0;
  document.getElementById("done").textContent = over ? "That was the last pair. Thank you." : "";
  document.getElementById("place").textContent = `pair ${Math.min(now + 1, quiz.pairs.length)} of ${quiz.pairs.length}`;
  document.getElementById("back").disabled = now === 0;
  if (!over) for (const [side, picture] of [["left", quiz.pairs[now][0]], ["right", quiz.pairs[now][1]]])
    document.getElementById(side).firstElementChild.src = "data:image/png;base64," + picture;
  document.getElementById("text").value = JSON.stringify({ quiz: quiz.name, answers: answers });
}
function choose(side) {
  if (now >= quiz.pairs.length) return;
  answers[now] = side;
  now += 1;
  show();
}
function back() {
  if (now === 0) return;
  now -= 1;
  delete answers[now];
  show();
}
function save() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([document.getElementById("text").value], { type: "application/json" }));
  link.download = "answers.json";
  link.click();
}
document.getElementById("left").addEventListener("click", () => choose("left"));
document.getElementById("right").addEventListener("click", () => choose("right"));
document.getElementById("back").addEventListener("click", back);
document.getElementById("save").addEventListener("click", save);
document.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") choose("left");
  if (event.key === "ArrowRight") choose("right");
  if (event.key === "Backspace" && event.target.tagName !== "TEXTAREA") back();
});
show();
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Real or drawn?</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Which of the two is drawn?</h1>
<p>One is a slice of a person, the other was drawn by a network. Take the one that you think is drawn; guess where you
do not know. Arrow keys work too. <span id="place"></span></p>
<div id="question">
<div id="pair">
<button id="left"><img alt="left slice"></button>
<button id="right"><img alt="right slice"></button>
</div>
</div>
<p><button id="back">one pair back</button></p>
<div id="end" hidden>
<p id="done"></p>
<p><button id="save">save answers.json</button> whenever you like; or copy this:</p>
<textarea id="text" readonly aria-label="answers"></textarea>
</div>
</main>
<script type="application/json" id="quiz">{quiz}</script>
<script>{script}</script>
</body>
</html>
"""


def as_png(picture):
    """(S, S) uint8 -> base64 of a PNG."""
    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()


def page(name, pictures):
    """The whole page as text.

    Args:
        name: of the quiz, by which answers find their sheet.
        pictures: [(left, right)], (S, S) uint8 each.
    """
    quiz = json.dumps({"name": name, "pairs": [[as_png(one) for one in pair] for pair in pictures]})
    quiz = quiz.replace("<", "\\u003c")  # so that no name ends the script
    return PAGE.format(policy=POLICY, style=STYLE, script=SCRIPT, quiz=quiz)
