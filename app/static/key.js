// The API key, where the service asks for one: typed once, kept until the tab is closed.

const NAME = "unet-api-key"; // the documentation reads it too
const SENDABLE = /^[\x20-\x7e]+$/; // fetch throws at a header of anything else

const $ = (id) => document.getElementById(id);
let typed = null; // the promise that somebody has submitted the form

/** The key to send, or null. One that no request can carry is forgotten: it would bar the way. */
export function key() {
  const kept = sessionStorage.getItem(NAME);
  if (kept === null || SENDABLE.test(kept)) return kept;
  sessionStorage.removeItem(NAME);
  return null;
}

/** Show the form until it is submitted, unless another key than the refused one is there by now. */
export function askForKey(refused) {
  if (key() !== refused) return Promise.resolve();
  $("key-note").textContent = refused ? "That key was refused." : "This service asks for an API key.";
  $("key-form").hidden = false;
  $("key").focus();
  typed ??= new Promise((done) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const text = $("key").value.trim();
      const strange = [...text].find((sign) => !SENDABLE.test(sign));
      if (strange || !text) {
        $("key-note").textContent = strange
          ? `No key holds “${strange}”: they are plain letters, digits and signs.`
          : "This service asks for an API key.";
        $("key").select();
        return;
      }
      sessionStorage.setItem(NAME, text);
      $("key-form").hidden = true;
      typed = null;
      done();
    };
  });
  return typed;
}
