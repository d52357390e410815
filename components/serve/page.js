// The chat page: what is asked goes to this server's /v1/chat/completions, and what it answers is text.
// Nothing here makes markup of a text: nodes are created by name from the list in markdown(), texts are their textContent.

const words = document.body.dataset;
const log = document.getElementById("log");
const box = document.getElementById("text");
const [send, stop] = ["send", "stop"].map(id => document.getElementById(id));
const keyField = document.getElementById("key");
const hello = log.firstElementChild;

let key = ""; // here alone: the field is emptied when it is read
let said = [];
let running = null;

class Refused extends Error {}

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// --- Markdown, as far as a model writes it: no links, no pictures, no HTML; what it does not know stays as it is --------

function inline(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(/(`{1,8})([^`]+)\1(?!`)|\*\*([^*\s](?:[^*]{0,1000}[^*\s])?)\*\*|\*([^*\s](?:[^*]{0,1000}[^*\s])?)\*/g)) {
    const [whole, , code, strong, weak] = match;
    const name = code ? "code" : strong ? "strong" : "em";
    found.push(text.slice(at, match.index), element(name, code ?? strong ?? weak));
    at = match.index + whole.length;
  }
  return [...found, text.slice(at)];
}

function filled(name, text) {
  const made = element(name);
  made.append(...inline(text));
  return made;
}

const STARTS = /^ {0,3}(`{3,}|~{3,})[^`]*$|^ {0,3}(#{1,6}) +(.*)|^ {0,3}((?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$|^ {0,3}> ?(.*)|^( *)([-*+]|\d{1,9}[.)]) +(.*)/;

function markdown(text) {
  // overrides of the direction of writing, which would show another text than the one that is there
  const lines = text.replace(/[\u202a-\u202e\u2066-\u2069]/g, "\ufffd").replace(/\r\n?/g, "\n").split("\n");
  const made = document.createDocumentFragment();
  const lists = []; // those that are open, each inside the one before
  let paragraph = [];
  const close = (outer = 0) => {
    if (paragraph.length) (lists.at(-1)?.item ?? made).append(...(lists.length ? inline(paragraph.join("\n")) : [filled("p", paragraph.join("\n"))]));
    paragraph = [];
    lists.length = Math.min(lists.length, outer);
  };
  for (let at = 0; at < lines.length; at++) {
    const [whole, fence, level, title, rule, quote, indent, mark, item] = STARTS.exec(lines[at]) ?? [];
    if (fence) {
      close();
      const end = new RegExp(`^ {0,3}[${fence[0]}]{${fence.length},} *$`), code = [];
      while (++at < lines.length && !end.test(lines[at])) code.push(lines[at]);
      const block = element("pre");
      block.append(element("code", code.join("\n")));
      made.append(block);
    } else if (level) {
      close();
      made.append(filled(`h${Math.min(level.length + 2, 5)}`, title));
    } else if (rule) {
      close();
      made.append(element("hr"));
    } else if (quote !== undefined) {
      close();
      const quoted = [quote];
      for (let next; (next = /^ {0,3}> ?(.*)/.exec(lines[at + 1] ?? "")); at++) quoted.push(next[1]);
      made.append(filled("blockquote", quoted.join("\n")));
    } else if (item !== undefined) {
      close(lists.length);
      while (lists.length && lists.at(-1).indent > indent.length) lists.pop();
      const name = /\d/.test(mark) ? "ol" : "ul", inner = lists.at(-1);
      if (!inner || (indent.length > inner.indent + 1 && lists.length < 6)) {
        const list = element(name);
        if (name === "ol") list.start = parseInt(mark);
        (inner?.item ?? made).append(list);
        lists.push({ list, indent: indent.length });
      }
      lists.at(-1).item = element("li");
      lists.at(-1).list.append(lists.at(-1).item);
      paragraph.push(item);
    } else if (!lines[at].trim()) {
      close(lists.length);
    } else {
      if (lists.length && !paragraph.length && !/^ /.test(lines[at])) close();
      paragraph.push(lines[at].trim());
    }
  }
  close();
  return made;
}

// --- what is shown ----------------------------------------------------------------------------------------------------

function shown(kind, name, content) {
  const made = element("article", "", kind);
  made.append(element("h2", name), content);
  // a reader who went back stays where they are
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.append(made);
  if (atEnd || kind === "user") log.scrollTop = log.scrollHeight;
  return made;
}

function notice(text) {
  const made = element("p", text, "notice");
  made.setAttribute("role", "alert");
  log.append(made);
  log.scrollTop = log.scrollHeight;
}

function busy(on) {
  log.setAttribute("aria-busy", on); // read out once, when it is whole
  send.hidden = on;
  stop.hidden = !on;
}

// --- what is asked ----------------------------------------------------------------------------------------------------

async function* pieces(messages, signal) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  let room = Number(words.room);
  for (;;) {
    const body = JSON.stringify({ model: words.model, messages, stream: true, ...(room && { max_tokens: room }) });
    const answer = await fetch("v1/chat/completions", { method: "POST", headers, body, signal, credentials: "omit" });
    if (answer.ok) {
      yield* texts(answer.body);
      return;
    }
    const error = (await answer.json().catch(() => null))?.error ?? {};
    if (answer.status === 401) {
      keyField?.focus();
      throw new Refused(words.wrongKey);
    }
    if (error.code !== "context_length_exceeded") throw new Refused(`${words.fault} (${error.message ?? answer.status})`);
    // the oldest question and its answer are forgotten; the last question may then take the answer's room
    if (messages.length > 2) messages.splice(0, 2);
    else if (room) room = 0;
    else throw new Refused(words.tooLong);
  }
}

async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(words.fault); // no [DONE] was seen
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const content = line.slice(5).trim();
      if (content === "[DONE]") return;
      const event = JSON.parse(content);
      if (event.error) throw new Refused(words.fault);
      yield event.choices?.[0]?.delta?.content ?? "";
    }
  }
}

async function ask(text) {
  if (keyField?.value) {
    key = keyField.value;
    keyField.value = "";
    keyField.placeholder = words.hasKey;
  }
  log.querySelectorAll(".notice").forEach(old => old.remove());
  const asked = shown("user plain", words.you, document.createTextNode(text));
  const answer = shown("answer", words.model, "");
  const mine = (running = new AbortController());
  const messages = [...said, { role: "user", content: text }];
  let whole = "", drawn = 0;
  const draw = () => {
    drawn = 0;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
    answer.replaceChildren(answer.firstChild, markdown(whole));
    if (atEnd) log.scrollTop = log.scrollHeight;
  };
  busy(true);
  try {
    for await (const piece of pieces(messages, mine.signal)) {
      whole += piece;
      drawn ||= requestAnimationFrame(draw);
    }
  } catch (error) {
    if (running === mine && !mine.signal.aborted) notice(error instanceof Refused ? error.message : words.fault);
  }
  cancelAnimationFrame(drawn);
  if (running !== mine) return; // a new chat was begun
  running = null;
  if (whole) {
    draw();
    said = [...messages, { role: "assistant", content: whole }];
  } else {
    // not asked: it goes back to where it can be changed
    answer.remove();
    asked.remove();
    box.value ||= text;
  }
  busy(false);
}

function submit() {
  const text = box.value.trim();
  if (!text || running) return;
  box.value = "";
  ask(text);
}

document.getElementById("ask").addEventListener("submit", event => {
  event.preventDefault();
  submit();
  box.focus();
});
box.addEventListener("keydown", event => {
  // Enter that chooses a word of an input method (229, in Safari, is that as well) sends nothing
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
keyField?.addEventListener("keydown", event => {
  if (event.key !== "Enter") return;
  box.focus();
  submit();
});
stop.addEventListener("click", () => {
  running?.abort();
  box.focus();
});
document.getElementById("new").addEventListener("click", () => {
  running?.abort();
  running = null;
  said = [];
  log.replaceChildren(hello);
  busy(false);
  box.focus();
});
box.focus();
