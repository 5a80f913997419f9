"use strict";
// The console of a machine: xterm.js over a WebSocket. Frames are bytes, as the serial line has them.
{
  const place = document.getElementById("console");
  const status = document.getElementById("console-status");
  const nonce = document.querySelector("meta[name=style-nonce]").nonce;

  // xterm.js makes style sheets; the page's policy lets only those with its word have an effect.
  const create = document.createElement.bind(document);
  document.createElement = (name, options) => {
    const element = create(name, options);
    if (String(name).toLowerCase() === "style") element.nonce = nonce;
    return element;
  };

  const terminal = new Terminal({ convertEol: false, screenReaderMode: true, scrollback: 10000 });
  const fit = new FitAddon.FitAddon();
  terminal.loadAddon(fit);
  terminal.open(place);
  fit.fit();
  new ResizeObserver(() => fit.fit()).observe(place);

  let socket = null;
  let again = false;
  const connect = () => {
    if (socket !== null) return;
    const address = new URL(place.dataset.address, location.href);
    address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
    socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    again = false;
    let said = "";
    socket.onopen = () => {
      terminal.reset();
      status.textContent = "It is connected.";
    };
    // Bytes are the console's; a text is the last word of the service: {"error": {...}}.
    socket.onmessage = ({ data }) => {
      if (typeof data === "string") said = JSON.parse(data).error?.message ?? "";
      else terminal.write(new Uint8Array(data));
    };
    socket.onclose = ({ reason }) => {
      socket = null;
      status.textContent = said || reason || "It is not connected.";
      if (again) connect();
    };
  };
  const send = (data) => { if (socket?.readyState === WebSocket.OPEN) socket.send(data); };
  const encoder = new TextEncoder();
  terminal.onData((text) => send(encoder.encode(text)));
  terminal.onBinary((text) => send(Uint8Array.from(text, (c) => c.charCodeAt(0))));

  // Tab goes to the guest, so something has to lead out (WCAG 2.2, 2.1.2): as in `vmlab console`.
  terminal.attachCustomKeyEventHandler((event) => {
    if (!(event.ctrlKey && event.key === "]")) return true;
    if (event.type === "keydown") {
      terminal.blur();
      document.getElementById("disks-title").focus();
    }
    event.preventDefault();
    return false;
  });

  // A machine that was started anew may have a console anew; one that had none may have one.
  const started = () => document.getElementById("state")?.dataset.started ?? "";
  let since = started();
  document.addEventListener("htmx:after:swap", () => {
    if (socket !== null && started() !== since) {
      again = true;
      socket.close();
    } else if (socket === null) {
      connect();
    }
    since = started();
  });
  connect();
}
