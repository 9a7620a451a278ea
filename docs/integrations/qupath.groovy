// QuPath (0.4 or later): segments the region of the selected annotation by unet-server, and adds the
// objects with their measurements as its children. Run it in Automate > Script editor.

import java.awt.geom.AffineTransform
import java.net.http.HttpClient
import java.net.http.HttpRequest
import java.net.http.HttpResponse
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjectTools
import qupath.lib.regions.RegionRequest

def service = 'http://localhost:8000'
def key = ''         // the API key, if the service needs one
def query = [output: 'polygons', model: 'nuclei', min_area: 20]
def downsample = 1.0
// For images of other than 1, 3 or 4 channels, the one to segment, from 0:
// query.channel = 0

def annotation = getSelectedObject()
if (annotation?.getROI() == null) {
    throw new IllegalStateException('Select an annotation first')
}
def server = getCurrentServer()
def calibration = server.getPixelCalibration()
if (calibration.hasPixelSizeMicrons()) {
    query.pixel_size = calibration.getAveragedPixelSizeMicrons() * downsample
}

def region = RegionRequest.createInstance(server.getPath(), downsample, annotation.getROI())
def file = File.createTempFile('unet-', '.tif')
def response
try {
    writeImageRegion(server, region, file.getAbsolutePath())
    def parameters = query.collect { name, value -> "${name}=${value}" }.join('&')
    def request = HttpRequest.newBuilder(URI.create("${service}/segment?${parameters}"))
        .header('Content-Type', 'image/tiff')
        .POST(HttpRequest.BodyPublishers.ofFile(file.toPath()))
    if (key) {
        request.header('X-API-Key', key)
    }
    response = HttpClient.newHttpClient().send(request.build(), HttpResponse.BodyHandlers.ofInputStream())
} finally {
    file.delete()
}
if (response.statusCode() != 200) {
    throw new IOException("unet-server: ${response.statusCode()}: ${response.body().text}")
}

// Coordinates of the region -> coordinates of the image.
def transform = AffineTransform.getTranslateInstance(region.getX(), region.getY())
transform.scale(downsample, downsample)
def objects = PathIO.readObjectsFromGeoJSON(response.body()).collect {
    def moved = PathObjectTools.transformObject(it, transform, true)
    moved.setName(it.getName())
    return moved
}
annotation.addChildObjects(objects)
fireHierarchyUpdate()
println "${objects.size()} objects"
