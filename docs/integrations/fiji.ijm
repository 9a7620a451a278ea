// Fiji and ImageJ (1.52 or later): segments the current slice by unet-server, and opens the objects in
// the ROI Manager. It needs curl, which Windows 10, macOS and most Linux systems have.
// Run it in Plugins > Macros > Run, or install it there.

service = "http://localhost:8000";
query = "output=rois&model=nuclei&min_area=20";
key = "";  // the API key, if the service needs one

title = getTitle();
image = getDirectory("temp") + "unet-image.tif";
rois = getDirectory("temp") + "unet-rois.zip";

run("Duplicate...", "title=unet-image");  // the current slice alone
saveAs("Tiff", image);
close();
selectWindow(title);

status = exec("curl", "-s", "-o", rois, "-w", "%{http_code}", "-H", "X-API-Key: " + key, "-F", "file=@" + image, service + "/segment?" + query);
File.delete(image);
if (startsWith(status, "000"))  // exec adds a line break
    exit("unet-server does not respond at " + service);
if (!startsWith(status, "200"))
    exit("unet-server: " + status + ": " + File.openAsString(rois));

roiManager("open", rois);
roiManager("show all");
File.delete(rois);
