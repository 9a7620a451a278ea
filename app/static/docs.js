// Starts Swagger UI on /docs. The Python package fastapi-swagger provides its script and style sheet.
// This is a file, not an inline script, because the page's policy allows scripts of this server only.

// The paths in openapi.json are relative to the root of the service. A proxy may serve that root under a
// path prefix: it is the folder of this page.
const serverUrl = new URL(".", document.baseURI).href.replace(/\/$/, "");

const SetServerUrl = {
  statePlugins: {
    spec: {
      wrapActions: {
        updateJsonSpec: (update) => (openapi) => update({ ...openapi, servers: [{ url: serverUrl }] }),
      },
    },
  },
};

SwaggerUIBundle({
  dom_id: "#swagger-ui",
  url: "openapi.json",
  plugins: [SetServerUrl],
  deepLinking: true,
  displayRequestDuration: true,
});
