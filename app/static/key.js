// Asks for the API key where the service requires one, and keeps it until the tab is closed.

const STORAGE_KEY = "unet-api-key";
const VALID_KEY = /^[\x21-\x7e]+$/; // the characters that the service allows

const $ = (id) => document.getElementById(id);
const KEY_REQUIRED = "This server requires an API key.";
let submitted = null; // a promise that resolves when the form is submitted

/** The key to send, or null. A stored key that no header can carry is removed. */
export function storedKey() {
  const key = sessionStorage.getItem(STORAGE_KEY);
  if (key === null || VALID_KEY.test(key)) return key;
  sessionStorage.removeItem(STORAGE_KEY);
  return null;
}

/** Show the form until it is submitted. Return at once if the stored key is no longer `rejectedKey`. */
export function askForKey(rejectedKey) {
  if (storedKey() !== rejectedKey) return Promise.resolve();
  $("key-note").textContent = rejectedKey ? "The server rejected this key." : KEY_REQUIRED;
  $("key-form").hidden = false;
  $("key").focus();
  submitted ??= new Promise((resolve) => {
    $("key-form").onsubmit = (event) => {
      event.preventDefault();
      const key = $("key").value.trim();
      const invalid = [...key].find((character) => !VALID_KEY.test(character));
      if (invalid || !key) {
        $("key-note").textContent = invalid
          ? `A key cannot contain “${invalid}”. Use letters A to Z, digits and ASCII punctuation.`
          : KEY_REQUIRED;
        $("key").select();
        return;
      }
      sessionStorage.setItem(STORAGE_KEY, key);
      $("key-form").hidden = true;
      submitted = null;
      resolve();
    };
  });
  return submitted;
}
