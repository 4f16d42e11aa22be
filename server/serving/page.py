"""The page at `/`: it explains a model and lets a person try it. It holds nothing of any model: what it shows it asks
the server for, with the token that the person types, which stays in the page's memory."""

from __future__ import annotations

import base64
import hashlib

_SCRIPT = """
"use strict";
const $ = (id) => document.getElementById(id);
let token = "", contract = null, name = "", last = null;
const call = async (path, body) => {
  const answer = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers: {Authorization: "Bearer " + token, "Content-Type": "application/json"},
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error || answer.statusText);
  return found;
};
const row = (table, cells) => {
  const line = table.insertRow();
  for (const cell of cells) {
    const place = line.insertCell();
    if (cell instanceof Node) place.append(cell); else place.textContent = cell;
  }
};
const field = (one) => {
  let input;
  if (one.kind === "categorical") {
    input = document.createElement("select");
    for (const value of [...(one.missing === "median" ? [""] : []), ...one.values]) {
      const option = document.createElement("option");
      option.value = option.textContent = value;
      input.append(option);
    }
  } else {
    input = document.createElement("input");
    input.type = "number"; input.step = "any"; input.min = one.min; input.max = one.max;
    input.placeholder = one.missing === "median" ? "missing: the median" : "needed";
  }
  input.id = "in " + one.name;
  input.setAttribute("aria-label", one.name);
  return input;
};
const show = async () => {
  $("error").textContent = "";
  const about = await call("/v2/models/" + encodeURIComponent(name));
  contract = await call("/v2/models/" + encodeURIComponent(name) + "/contract");
  $("about").textContent = contract.study.name + ", " + contract.rounds + " rounds of " + contract.strategy +
    "; served versions: " + about.versions.join(", ") + "; model " + contract.model.slice(0, 12);
  $("inputs").replaceChildren();
  const columns = contract.inputs.every((one) => one.kind !== "tensor");
  for (const one of contract.inputs) {
    const range = one.kind === "categorical" ? "a code" :
      one.kind === "tensor" ? one.dtype + " [" + one.shape + "]" : one.min + " to " + one.max;
    row($("inputs"), [one.name, range, columns ? field(one) : "by program"]);
  }
  $("try").disabled = !columns;
  $("model").hidden = false;
};
const datatype = {float32: "FP32", float64: "FP64", int64: "INT64", uint8: "UINT8"};
const attempt = async () => {
  $("error").textContent = "";
  const inputs = contract.inputs.map((one) => {
    const text = $("in " + one.name).value;
    const value = one.kind === "categorical" ? text : text === "" ? null : Number(text);
    const kind = one.kind === "categorical" ? "BYTES" : datatype[one.dtype];
    return {name: one.name, datatype: kind, shape: [1, 1], data: [value]};
  });
  const found = await call("/v2/models/" + encodeURIComponent(name) + "/infer", {inputs});
  $("answers").replaceChildren();
  for (const one of found.outputs) {
    const said = contract.outputs.find((output) => output.name === one.name);
    one.data.forEach((value, i) => row($("answers"), [
      one.name + (said.classes ? ", class " + said.classes[i] : ""), Number(value).toPrecision(4)]));
  }
  $("by").textContent = "version " + found.model_version + ", prediction " + found.parameters.prediction_id;
};
const guarded = (act) => async (event) => {
  event.preventDefault();
  try { await act(); } catch (error) { $("error").textContent = error.message; }
};
$("enter").addEventListener("submit", guarded(async () => {
  token = $("token").value;
  const all = await call("/v2/repository/index", {});
  $("name").replaceChildren();
  for (const one of new Set(all.map((each) => each.name))) {
    const option = document.createElement("option");
    option.value = option.textContent = one;
    $("name").append(option);
  }
  name = $("name").value;
  await show();
}));
$("name").addEventListener("change", guarded(async () => { name = $("name").value; await show(); }));
$("form").addEventListener("submit", guarded(attempt));
"""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: 1rem 0; } td { padding: .25rem 1rem .25rem 0; }
input, select, button { font: inherit; padding: .25rem .5rem; } #error { color: #a40000; }
"""

_BODY = """
<h1>A model, served</h1>
<p>The answers of this model are computed from what you type; KEPT. An answer is
help for a professional's judgement, and no diagnosis or decision by itself.</p>
<form id="enter"><label>Token <input id="token" type="password" autocomplete="off" required></label>
<button>Open</button></form>
<p id="error" role="alert"></p>
<section id="model" hidden>
<p><label>Model <select id="name"></select></label></p><p id="about"></p>
<form id="form"><table id="inputs"></table><button id="try">Predict</button></form>
<table id="answers" aria-live="polite"></table><p id="by"></p>
</section>
"""

_HTML = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A model, served</title>'
    '<meta name="viewport" content="width=device-width"><style>'
    f"{_STYLE}</style></head><body>{_BODY}<script>{_SCRIPT}</script></body></html>"
)


def html(kept_days: int | None) -> str:
    """The page. kept_days: how long what is typed is kept, None where it is not."""
    kept = "nothing of it is kept but that you asked"
    if kept_days is not None:
        kept = (
            f"it is kept, encrypted, for {kept_days} day{'' if kept_days == 1 else 's'}, and that you asked"
        )
    return _HTML.replace("KEPT", kept)


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


HEADERS = {
    "Content-Security-Policy": f"default-src 'none'; script-src 'sha256-{_hash(_SCRIPT)}'; "
    f"style-src 'sha256-{_hash(_STYLE)}'; connect-src 'self'; form-action 'none'; frame-ancestors 'none'; "
    "base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
"""Only these very bytes run and only this server is asked."""
