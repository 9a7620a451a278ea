// Completes an address without its last slash, such as https://lab/unet of a service behind the prefix /unet/.
//
// There, static/app.js would miss the prefix. An address that is only a query keeps the path, so index.html loads
// this file as "?slash.js", before everything else.
if (!location.pathname.endsWith("/")) location.replace(`${location.pathname}/${location.search}`);
