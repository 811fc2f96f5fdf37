// Keeps the page up to date. Without this script the page shows the same as of the time when it was loaded.
"use strict";

(() => {
  const body = document.body;
  const root = body.dataset.root;
  let offset = 0; // milliseconds by which the server's clock is ahead of this machine's
  let events = null;
  let query = location.search;

  // Times -----------------------------------------------------------------------------------------------------------

  // As span() in pybreaker_redis/_board.py
  function span(seconds) {
    for (const [unit, length] of [["d", 86400], ["h", 3600], ["m", 60]]) {
      if (seconds >= 2 * length) return `${Math.round(seconds / length)} ${unit}`;
    }
    return seconds >= 10 ? `${Math.round(seconds)} s` : `${Math.max(seconds, 0).toFixed(1)} s`;
  }

  function put(element, text) {
    if (element.textContent !== text) element.textContent = text;
  }

  function setClock(now) {
    offset = now * 1000 - Date.now();
  }

  function tick() {
    const now = (Date.now() + offset) / 1000;
    for (const one of document.querySelectorAll("[data-until]")) {
      const left = one.dataset.until - now;
      put(one, left > 0 ? `${one.dataset.before} ${span(left)}` : one.dataset.after);
    }
    for (const one of document.querySelectorAll("[data-ago]")) put(one, `${span(Math.max(now - one.dataset.ago, 0))} ago`);
    for (const one of document.querySelectorAll("[data-at]")) put(one, local(one.dataset.at));
  }

  function local(seconds) {
    const at = new Date(seconds * 1000);
    const day = at.toDateString() === new Date().toDateString() ? undefined : "medium";
    return new Intl.DateTimeFormat(undefined, { dateStyle: day, timeStyle: "medium" }).format(at);
  }

  // Live ------------------------------------------------------------------------------------------------------------

  function connect() {
    if (events) events.close();
    if (!body.dataset.events || !window.EventSource) return;
    const joined = body.dataset.events.includes("?") ? "" : query;
    events = new EventSource(body.dataset.events + joined);
    events.addEventListener("board", (event) => showBoard(JSON.parse(event.data)));
    events.addEventListener("breaker", (event) => showBreaker(JSON.parse(event.data)));
    events.addEventListener("error", () => {
      fill("status", '<span class="live lost">Connection lost. Trying again.</span>');
      if (events.readyState === EventSource.CLOSED) setTimeout(connect, 3000);
    });
  }

  // The server has escaped everything in what it sends as HTML.
  function fill(id, html) {
    const element = document.getElementById(id);
    if (!element || element.sent === html) return;
    element.sent = html;
    element.innerHTML = html;
  }

  function rowFrom(html) {
    const template = document.createElement("template");
    template.innerHTML = html;
    return template.content.querySelector("tr");
  }

  function showBoard(message) {
    setClock(message.now);
    for (const part of ["chips", "pager", "status"]) fill(part, message[part]);
    const rows = document.getElementById("rows");
    const known = new Map(Array.from(rows.children, (row) => [row.dataset.name, row]));
    for (const [name, html] of Object.entries(message.rows)) replace(known, name, rowFrom(html));
    message.order.forEach((name, place) => {
      const row = known.get(name);
      if (row && rows.children[place] !== row) rows.insertBefore(row, rows.children[place] || null);
    });
    while (rows.children.length > message.order.length) rows.lastElementChild.remove();
    tick();
  }

  function replace(known, name, row) {
    const old = known.get(name);
    known.set(name, row);
    if (!old) return;
    const focused = old.contains(document.activeElement);
    if (old.className !== row.className) row.classList.add("changed");
    old.replaceWith(row);
    if (focused) row.querySelector("a")?.focus();
  }

  function showBreaker(message) {
    fill("status", message.status);
    if (message.html === undefined) return; // not read now: what was read before stays
    setClock(message.now);
    const template = document.createElement("template");
    template.innerHTML = message.html;
    const live = document.getElementById("live");
    for (const old of Array.from(live.children)) if (!template.content.getElementById(old.id)) old.remove();
    for (const section of Array.from(template.content.children)) {
      const old = document.getElementById(section.id);
      if (!old) live.append(section);
      else if (old.innerHTML !== section.innerHTML) old.replaceWith(section);
    }
    tick();
  }

  // Filters without a reload ----------------------------------------------------------------------------------------

  function look(search, push) {
    query = search;
    if (push) history.pushState(null, "", `${root}/${search}`);
    connect();
  }

  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[data-view]");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
    look(new URL(link.href).search, true);
    if (link.closest("#pager")) scrollTo(0, 0);
  });

  const tools = document.getElementById("tools");
  if (tools) {
    let waiting = null;
    const asked = () => {
      const now = new URLSearchParams(query);
      now.delete("page");
      for (const name of ["q", "sort"]) {
        const value = tools.elements[name].value;
        if (value && value !== "urgency") now.set(name, value);
        else now.delete(name);
      }
      return now.size ? `?${now}` : "";
    };
    tools.addEventListener("submit", (event) => {
      event.preventDefault();
      look(asked(), true);
    });
    tools.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => look(asked(), true), 150);
    });
    addEventListener("popstate", () => {
      const now = new URLSearchParams(location.search);
      tools.elements.q.value = now.get("q") || "";
      tools.elements.sort.value = now.get("sort") || "urgency";
      look(location.search, false);
    });
  }

  // Keys ------------------------------------------------------------------------------------------------------------

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const search = document.getElementById("search");
    if (event.key === "/" && search) {
      event.preventDefault();
      search.focus();
    } else if (event.key === "j" || event.key === "k") {
      step(event.key === "j" ? 1 : -1);
    }
  });

  function step(by) {
    const links = Array.from(document.querySelectorAll("#rows .c-name a"));
    const here = links.findIndex((link) => link === document.activeElement);
    links[Math.min(Math.max(here + by, 0), links.length - 1)]?.focus();
  }

  // A hidden page frees its connection: browsers allow six to one server.
  document.addEventListener("visibilitychange", () => {
    if (document.hidden && events) events.close();
    else connect();
  });

  if (body.dataset.now) setClock(Number(body.dataset.now));
  tick();
  setInterval(tick, 1000);
  connect();
})();
