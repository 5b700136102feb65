// The rollouts of a run's page: groups are unpacked part by part, and drawn page by page.
"use strict";

function rollouts(data, index) {
  const GROUPS = 10; // on a page
  const KEPT = 12; // unpacked parts
  const CHANGES = ["wrong → wrong", "wrong → right", "right → wrong", "right → right"];
  const NAMES = { think: ["first_think", "second_think"], answer: ["first_answer", "second_answer"],
    reflection: ["reflection", "reflection"] };
  const form = document.getElementById("rollouts-form");
  const place = document.getElementById("rollouts");
  const status = document.getElementById("rollouts-status");
  const parts = new Map();
  let turn = 0; // a newer search ends an older one
  let starts = [0]; // where each page up to this one begins
  let next = null; // where the next one would

  async function part(number) {
    if (!parts.has(number)) {
      if (parts.size >= KEPT) parts.delete(parts.keys().next().value);
      const text = atob(document.getElementById(`part-${number}`).textContent);
      const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
      const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      parts.set(number, JSON.parse(await new Response(plain).text()));
    }
    return parts.get(number);
  }

  // --- what is looked for ---

  function wanted() {
    const field = (name) => form.elements[name].value;
    const bound = (name, none) => (field(name) === "" ? none : Number(field(name)));
    return {
      run: form.elements.run ? field("run") : "",
      change: field("change"),
      steps: [bound("step-from", -Infinity), bound("step-to", Infinity)],
      reward: [bound("reward-from", -Infinity), bound("reward-to", Infinity)],
      tokens: [bound("tokens-from", -Infinity), bound("tokens-to", Infinity)],
      text: field("text").toLowerCase(),
      backwards: field("order") === "last",
    };
  }

  const within = (value, [low, high]) => value >= low && value <= high;
  const overlap = (low, high, bounds) => high >= bounds[0] && low <= bounds[1];

  // Whether a group may hold what is looked for; only its part says whether it does.
  function mayFit(at, want) {
    return (want.run === "" || index.run[at] === Number(want.run))
      && within(index.step[at], want.steps)
      && (want.change === "" || index.changes[at] & (1 << Number(want.change)))
      && overlap(index.low[at], index.high[at], want.reward)
      && overlap(index.short[at], index.long[at], want.tokens);
  }

  const change = (sample) => 2 * sample.first_correct + sample.final_correct;

  function fits(group, sample, want) {
    if (want.change !== "" && change(sample) !== Number(want.change)) return false;
    if (!within(sample.total, want.reward) || !within(sample.tokens, want.tokens)) return false;
    if (!want.text) return true;
    const words = [group.id, group.question, group.source, group.gold, sample.completion];
    return words.some((word) => String(word ?? "").toLowerCase().includes(want.text));
  }

  async function show() {
    const mine = ++turn, want = wanted(), found = [];
    const all = index.step.map((_, at) => at).filter((at) => mayFit(at, want));
    if (want.backwards) all.reverse();
    let at = starts[starts.length - 1];
    status.textContent = "looking …";
    for (; at < all.length && found.length < GROUPS; at++) {
      const groups = await part(Math.floor(all[at] / data.part));
      if (mine !== turn) return;
      const group = groups[all[at] % data.part];
      const marks = group.samples.map((sample) => fits(group, sample, want));
      if (marks.includes(true)) found.push([group, marks]);
    }
    next = at < all.length ? at : null;
    place.replaceChildren(...found.map(([group, marks]) => drawGroup(group, marks)));
    const count = all.length.toLocaleString("en");
    status.textContent = found.length
      ? `page ${starts.length}: ${found.length} groups, of ${count} that may fit`
      : "no group fits";
    form.elements.back.disabled = starts.length === 1;
    form.elements.next.disabled = next === null;
  }

  // --- how a group looks ---

  function badge(text, kind) {
    return make("span", `badge ${kind ?? ""}`, text);
  }

  function drawGroup(group, marks) {
    const run = data.runs.length > 1 ? `${data.runs[group.run]}, ` : "";
    const note = `${run}step ${group.step}${group.round ? `, round ${group.round + 1}` : ""}`;
    const head = make("div", "head", make("h2", "", String(group.id)));
    for (const [number, name] of CHANGES.entries()) {
      const count = group.samples.filter((sample) => change(sample) === number).length;
      if (count) head.append(badge(`${count} ${name}`, ["bad", "good", "bad", "good"][number]));
    }
    head.append(make("span", "soft", note + (group.source ? `, ${group.source}` : "")));
    const samples = make("div", "samples", ...group.samples.map((s, i) => drawSample(s, marks[i])));
    samples.tabIndex = 0;
    samples.setAttribute("role", "group");
    samples.setAttribute("aria-label", `samples of ${group.id}, step ${group.step}`);
    return make("article", "", head, make("div", "problem", ...problem(group)), samples);
  }

  function problem(group) {
    const shown = [];
    if (group.picture !== undefined) shown.push(...pictures(group));
    const words = make("div", "words");
    const text = make("p", "text", group.question ?? "These rollouts do not hold the question.");
    text.dir = "auto";
    words.append(text);
    if (group.choices?.length)
      words.append(make("ol", "", ...group.choices.map((choice, i) =>
        make("li", "", `(${i < 26 ? String.fromCharCode(65 + i) : i + 1}) ${choice}`))));
    words.append(make("p", "gold-line", badge("gold", "good"), " ", make("bdi", "", String(group.gold))));
    return [...shown, words];
  }

  function pictures(group) {
    const node = document.getElementById(`picture-${group.picture}`);
    if (!node) return [make("p", "soft", `image left out (--images): ${group.images.join(", ")}`)];
    const { images, image_fault } = JSON.parse(node.textContent);
    if (image_fault) return [make("p", "soft", `no image: ${image_fault}`)];
    return images.map(([url, width, height], i) => {
      const image = make("img");
      image.src = url;
      image.alt = `image ${i + 1} of the problem, ${width} x ${height} pixels`;
      return image;
    });
  }

  function drawSample(sample, marked) {
    const right = (yes) => badge(yes ? "right" : "wrong", yes ? "good" : "bad");
    const head = make("p", "line", make("b", "", `sample ${sample.sample}`), " ",
      right(sample.first_correct), " → ", right(sample.final_correct));
    const flags = [[!sample.finished, "cut off"], [!sample.format_ok, "template broken"],
      [sample.weight === 0, "not in the update"]];
    for (const [on, text] of flags) if (on) head.append(" ", badge(text, "mixed"));
    const numbers = make("dl", "terms");
    const values = { ...sample.terms, total: sample.total, advantage: sample.advantage, tokens: sample.tokens };
    for (const [name, value] of Object.entries(values))
      numbers.append(make("div", name === "total" || name === "advantage" ? "main" : "",
        make("dt", "", name), make("dd", "", value === null ? "not finite" : String(Number(value.toPrecision(3))))));
    const card = make("div", marked ? "sample" : "sample dim", head, numbers, ...blocks(sample));
    if (sample.no_reward) card.append(make("p", "soft", `no reward: ${sample.no_reward}`));
    return card;
  }

  // The completion with its blocks coloured; what stands outside of them is shown as well.
  function blocks(sample) {
    const shown = [], seen = {}, text = sample.completion;
    let end = 0;
    const rest = (words) => {
      if (words.trim()) shown.push(make("p", "text outside", words.trim()));
    };
    for (const match of text.matchAll(/<(think|answer|reflection)>([^]*?)<\/\1>/g)) {
      rest(text.slice(end, match.index));
      end = match.index + match[0].length;
      const kind = match[1], count = (seen[kind] = (seen[kind] ?? 0) + 1);
      const tokens = sample.block_tokens?.[NAMES[kind][Math.min(count, 2) - 1]];
      const block = make("p", `text block ${kind}`, match[2].trim());
      block.dir = "auto";
      shown.push(make("h3", "", kind, tokens === undefined ? "" : `, ${tokens} tokens`), block);
    }
    rest(text.slice(end));
    return shown;
  }

  // --- what a person does ---

  function restart() {
    starts = [0];
    show();
  }

  let typing = 0;
  form.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(restart, 250);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.elements.next.addEventListener("click", () => {
    starts.push(next);
    show();
  });
  form.elements.back.addEventListener("click", () => {
    starts.pop();
    show();
  });
  // #rollouts-part?change=2&step-from=10 fills the form: a view can be linked to.
  function fromAddress() {
    const [where, query] = location.hash.split("?");
    if (where === "#rollouts-part" && query !== undefined) {
      form.reset();
      for (const [name, value] of new URLSearchParams(query))
        if (form.elements[name]) form.elements[name].value = value;
      document.getElementById("rollouts-part").scrollIntoView();
    }
    restart();
  }

  addEventListener("hashchange", fromAddress);
  if (typeof DecompressionStream === "undefined")
    status.textContent = "this browser is too old to unpack rollouts";
  else fromAddress();
}
