// The behaviour of a report: sorting and filtering (DataTables does it), what a point says, and the sample browser.
// Everything shown is set as text, never as markup.
"use strict";
(() => {
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  const tabulate = (table, options) =>
    new DataTable(table, {
      autoWidth: false, order: [], paging: false,
      layout: { topStart: null, topEnd: "search", bottomStart: null, bottomEnd: "info" },
      language: { search: "filter ", info: "_TOTAL_ rows", infoEmpty: "no row is like that", infoFiltered: "of _MAX_" },
      ...options,
    });
  for (const table of document.querySelectorAll("table.data")) if (table.tBodies[0].rows.length > 1) tabulate(table);

  // A point's numbers, beside the pointer or on a tap. Without this script browsers show the same as a title.
  const tip = document.body.appendChild(make("div", "", "tip-box"));
  tip.hidden = true;
  for (const point of document.querySelectorAll("g.tip")) {
    const title = point.querySelector("title");
    point.dataset.tip = title.textContent;
    point.setAttribute("aria-label", title.textContent);
    title.remove();
  }
  const showTip = (event) => {
    const point = event.target.closest && event.target.closest("g.tip");
    tip.hidden = !point;
    if (!point) return;
    tip.textContent = point.dataset.tip;
    const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, most))}px`;
    tip.style.top = `${event.clientY + 18}px`;
  };
  for (const figure of document.querySelectorAll("figure")) {
    figure.addEventListener("pointermove", showTip);
    figure.addEventListener("pointerdown", showTip);
    figure.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  const source = document.getElementById("samples-data");
  if (!source) return;
  const { labels, baseline, tasks, prompts } = JSON.parse(source.textContent);
  const root = document.getElementById("samples");
  const length = (n) => (n % 1048576 === 0 ? `${n / 1048576}M` : n % 1024 === 0 ? `${n / 1024}K` : n.toLocaleString("en"));
  const choice = (text, options) => {
    const label = root.querySelector(".controls").appendChild(make("label", `${text} `));
    const select = label.appendChild(make("select"));
    for (const [value, name] of options) select.appendChild(make("option", name)).value = value;
    select.addEventListener("change", () => shown.draw());
    return select;
  };
  const all = [["", "all"]];
  const lengths = [...new Set(prompts.map((prompt) => prompt.length))].sort((a, b) => a - b);
  const method = choice("method", [["", "any"], ...labels.map((name, place) => [place, name])]);
  const kinds = [...all, ["failed", "failed"], ...(baseline === null ? [] : [["differs", `differs from ${labels[baseline]}`]])];
  const state = choice("answers", kinds);
  const task = choice("task", [...all, ...tasks.map((name, place) => [place, name])]);
  const size = choice("length", [...all, ...lengths.map((n) => [n, length(n)])]);
  const depth = choice("depth", [...all, ...[0, 1, 2, 3, 4].map((part) => [part, `${20 * part}-${20 * part + 20} %`])]);

  const score = (answer) => (answer ? answer[0] : null);
  const isLike = (prompt) => {
    if (task.value !== "" && prompt.task !== Number(task.value)) return false;
    if (size.value !== "" && prompt.length !== Number(size.value)) return false;
    if (depth.value !== "" && (prompt.depth === null || Math.min(4, Math.floor(5 * prompt.depth)) !== Number(depth.value))) return false;
    const asked = method.value === "" ? prompt.answers : [prompt.answers[Number(method.value)]];
    const there = asked.filter((answer) => answer);
    if (!there.length) return false;
    if (state.value === "failed") return there.some((answer) => answer[0] === null || answer[0] < 1);
    if (state.value === "differs") {
      const dense = prompt.answers[baseline];
      return dense !== null && there.some((answer) => score(answer) !== score(dense));
    }
    return true;
  };

  const detail = (prompt) => {
    const box = make("div", undefined, "detail");
    const facts = [`seed ${prompt.seed}`, `${prompt.tokens.toLocaleString("en")} tokens`, `hash ${prompt.hash}`];
    if (prompt.type) facts.unshift(prompt.type);
    box.appendChild(make("p", facts.join(", ")));
    box.appendChild(make("p", `expected: ${prompt.targets.map((target) => JSON.stringify(target)).join(", ")}`));
    const answers = box.appendChild(make("div", undefined, "answers"));
    prompt.answers.forEach((answer, place) => {
      if (!answer) return;
      const kind = answer[0] === null ? "failed" : answer[0] >= 1 ? "right" : "wrong";
      const card = answers.appendChild(make("div", undefined, `answer ${kind}`));
      card.appendChild(make("b", labels[place]));
      card.appendChild(make("span", ` ${answer[0] === null ? answer[1] : answer[0]}${answer[3] ? " (a tie)" : ""}`));
      card.appendChild(make("pre", answer[2]));
    });
    const text = box.appendChild(make("pre", undefined, "prompt"));
    if (!prompt.text) text.textContent = "The prompt's text is not on this page.";
    for (const [kind, part] of prompt.text || []) {
      if (kind === "gap") text.appendChild(make("span", `\n[${part.toLocaleString("en")} characters]\n`, "gap"));
      else text.appendChild(kind === "evidence" ? make("mark", part) : document.createTextNode(part));
    }
    return box;
  };

  const marks = (prompt) => {
    const box = make("span");
    prompt.answers.forEach((answer, place) => {
      const kind = !answer || answer[0] === null ? "failed" : answer[0] >= 1 ? "right" : "wrong";
      const sign = box.appendChild(make("span", { failed: "–", right: "✓", wrong: "✗" }[kind], `mark ${kind}`));
      sign.title = `${labels[place]}: ${answer ? answer[0] ?? answer[1] : "no row"}`;
    });
    return box;
  };
  const body = root.querySelector("tbody");
  prompts.forEach((prompt) => {
    const row = body.appendChild(make("tr"));
    const cells = [tasks[prompt.task], length(prompt.length), prompt.sample, prompt.depth === null ? "" : prompt.depth.toFixed(2)];
    cells.forEach((cell, place) => row.appendChild(make("td", String(cell), place ? "num" : "")));
    row.cells[1].dataset.order = prompt.length;
    const right = prompt.answers.filter((answer) => answer && answer[0] >= 1).length;
    const last = row.appendChild(make("td"));
    last.dataset.order = right;
    const button = last.appendChild(make("button"));
    button.appendChild(marks(prompt));
    button.setAttribute("aria-label", `sample ${prompt.sample} of ${tasks[prompt.task]}: ${right} of ${labels.length} methods right; show answers`);
    row.prompt = prompt;
  });
  const shown = tabulate(root.querySelector("table"), {
    paging: true, pageLength: 15, searching: true,
    layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
    language: { info: "_START_ to _END_ of _TOTAL_ prompts", infoEmpty: "no prompt is like that", infoFiltered: "(of _MAX_)" },
  });
  shown.search.fixed("chosen", (_text, _data, place) => isLike(prompts[place]));
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row || !row.prompt) return;
    const entry = shown.row(row);
    if (entry.child.isShown()) entry.child.hide();
    else entry.child(detail(row.prompt)).show();
    row.classList.toggle("open", entry.child.isShown());
  });
  shown.draw();
})();
