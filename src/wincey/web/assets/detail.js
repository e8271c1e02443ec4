// What is known of the host or link that is selected, and `explain` from one host to an address.

import { badge, duration, element, linkFigures, linkId, milliseconds, percent, rate } from "./text.js";

const SHOWN = 40;

function facts(pairs) {
  return element("dl", {}, pairs.filter(([, value]) => value !== "" && value !== null && value !== undefined).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]));
}

const firstAddress = (subnet) => subnet.replace(/\/\d+$/, "").replace(/(\d+)$/, (last) => String(Number(last) + 2));

export class Detail {
  constructor(onSelect, ask) {
    this.onSelect = onSelect;
    this.ask = ask;
    this.box = document.getElementById("detail");
    this.answers = new Map();
    this.targets = new Map();
  }

  update(picture, selection) {
    const hosts = new Map(picture.hosts.map((host) => [host.id, host]));
    const host = selection?.kind === "host" ? hosts.get(selection.id) : null;
    const link = selection?.kind === "link" ? picture.links.find((each) => linkId(each) === selection.id) : null;
    this.box.hidden = !(host || link);
    if (this.box.hidden) return;
    const active = this.box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    const typed = active?.startsWith("to ") ? [document.activeElement.selectionStart, document.activeElement.selectionEnd] : null;
    const top = this.key === selection.id ? this.box.scrollTop : 0;
    this.key = selection.id;
    this.again = () => this.update(picture, selection);
    const close = element("button", { class: "quiet close", "data-key": "close", "aria-label": "Close", onclick: () => this.onSelect(null, { keyboard: true }) }, "×");
    this.box.replaceChildren(close, ...(host ? this.host(host, hosts, picture) : this.link(link, hosts)));
    this.box.scrollTop = top;
    if (active) {
      const again = this.box.querySelector(`[data-key="${CSS.escape(active)}"]`);
      again?.focus({ preventScroll: true });
      if (typed) again?.setSelectionRange(...typed);
    }
  }

  host(host, hosts, picture) {
    const links = picture.links.filter((link) => link.a === host.id || link.b === host.id);
    const order = { bad: 0, warn: 1, lease: 2, ok: 3 };
    links.sort((a, b) => order[a.state] - order[b.state]);
    const other = hosts.get(links[0] ? (links[0].a === host.id ? links[0].b : links[0].a) : picture.hosts.find((each) => each.id !== host.id)?.id);
    return [
      element("h2", {}, host.name, badge(host.state)),
      ...host.troubles.map((trouble) => element("p", { class: `trouble ${host.state}` }, trouble)),
      host.told ? element("p", { class: "trouble lease" }, `Known by its lease only: ${host.told}`) : null,
      facts([
        ["Address", host.public.join(", ")], ["Subnet", host.subnets.join(", ")], ["Backend", host.backend],
        ["Lease", host.told ? "" : host.reserved ? "reserved" : host.left === null ? "" : `${duration(host.left)} left`],
        ["MTU", host.mtu ? `${host.mtu} in containers` : ""], ["Interface", host.interface],
        ["State", host.told ? "" : `${host.objects} objects, ${host.repaired} repaired`],
        ["Wincey", host.version && `${host.version}, up ${duration(host.up)}`],
      ]),
      host.devices.length ? element("h3", {}, "Traffic") : null,
      ...host.devices.map((device) => facts([[device.name, `↓ ${rate(device.receive)}  ↑ ${rate(device.send)}`], ["", device.errors + device.dropped ? `${device.errors} errors, ${device.dropped} dropped` : ""]])),
      host.told ? null : element("h3", {}, `Containers (${host.containers.length})`),
      element("ul", { class: "mono" }, host.containers.slice(0, SHOWN).map((each) => element("li", {}, `${each.address} `, element("span", { class: "soft" }, `${each.device} ${each.mac}`)))),
      ...(host.told || !other ? [] : this.explain(host, other, "Explain the way to")),
      links.length ? element("h3", {}, `Links (${links.length})`) : null,
      element("div", { class: "rows" }, links.slice(0, SHOWN).map((link) => {
        const name = hosts.get(link.a === host.id ? link.b : link.a).name;
        const { rtt, loss } = linkFigures(link);
        return element("button", { class: link.state, "data-key": linkId(link), onclick: () => this.onSelect({ kind: "link", id: linkId(link) }) },
          element("span", {}, name), element("span", { class: "soft" }, rtt === null ? "" : `${milliseconds(rtt)}  ${percent(loss)} lost`));
      })),
      links.length > SHOWN ? element("p", { class: "soft" }, `and ${links.length - SHOWN} more: see the table of links`) : null,
    ].filter(Boolean);
  }

  link(link, hosts) {
    const [a, b] = [hosts.get(link.a), hosts.get(link.b)];
    const choose = (host) => element("button", { class: host.state, "data-key": host.id, onclick: () => this.onSelect({ kind: "host", id: host.id }) }, element("span", {}, host.name), element("span", { class: "soft" }, host.subnets[0]));
    return [
      element("h2", {}, `${a.name} – ${b.name}`, badge(link.state)),
      element("div", { class: "rows" }, choose(a), choose(b)),
      ...link.ways.flatMap((way) => [
        element("h3", {}, `${hosts.get(way.start).name} → ${hosts.get(way.end).name}`),
        ...way.troubles.map((trouble) => element("p", { class: `trouble ${link.state}` }, trouble)),
        facts([
          ["Round trip", milliseconds(way.rtt)], ["Lost", percent(way.loss)],
          ["MTU", way.mtu ? `${way.mtu} of ${way.promised}` : "–"], ["By", link.backend],
          ["Traffic", way.send === null ? "not counted: --metrics-peers counts" : `↑ ${rate(way.send)}  ↓ ${rate(way.receive)}`],
          ["Asked", way.rtt === null && way.loss === null ? "not yet: --probe asks" : way.through ? "through the network" : "from host to host"],
        ]),
        element("ul", { class: "mono soft" }, way.objects.map((each) => element("li", {}, each))),
      ]),
      ...(a.told ? [] : this.explain(a, b, `Explain ${a.name} →`)),
      ...(b.told ? [] : this.explain(b, a, `Explain ${b.name} →`)),
    ];
  }

  explain(from, to, title) {
    const key = `${from.id} ${to.id}`;
    const usual = to.containers[0]?.address ?? firstAddress(to.subnets[0]);
    const input = element("input", {
      "data-key": `to ${key}`, "aria-label": `${title} address`, value: this.targets.get(key) ?? usual, spellcheck: "false",
      oninput: (event) => this.targets.set(key, event.target.value),
      onkeydown: (event) => { if (event.key === "Enter") run(); },
    });
    const run = async () => {
      this.answers.set(key, { busy: true });
      this.again();
      this.answers.set(key, await this.ask(from.id, input.value.trim()));
      this.again();
    };
    const answer = this.answers.get(key);
    return [
      element("h3", {}, title),
      element("div", { class: "ask" }, input, element("button", { "data-key": `run ${key}`, onclick: run }, "Explain")),
      ...(answer ? this.answer(answer) : []),
    ];
  }

  answer(answer) {
    if (answer.busy) return [element("p", { class: "verdict" }, "asking …")];
    if (answer.error) return [element("p", { class: "trouble bad", role: "alert" }, answer.error)];
    return [
      element("p", { class: `verdict ${answer.reaches ? "ok" : "bad"}`, role: "status" }, answer.reaches ? `Nothing keeps packets to ${answer.address} back here.` : `Breaks at ${answer.breaks_at}`),
      element("ul", { class: "steps" }, answer.steps.map((step) => element("li", { class: step.ok ? "yes" : "no" }, element("span", {}, step.what), element("span", {}, step.text)))),
    ];
  }
}
