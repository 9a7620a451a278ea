// Lists the files that were dropped or chosen, with their paths, in natural order.

const IMAGE_NAME = /\.(png|jpe?g|tiff?|webp|bmp|gif|avif|jp2|j2k|jpf|jpx|heic|heif)$/i;
const { compare } = new Intl.Collator(undefined, { numeric: true }); // img2 before img10

/** [{file, path}] of a FileList. Files of a chosen folder have a relative path. */
export const fromList = (files) => [...files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));

/** The files of a drop, including those in folders: {files, unreadable}; unreadable is a count. */
export async function fromDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return { files: fromList(transfer.files), unreadable: 0 };
  const files = [];
  let unreadable = 0;
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      files.push({ file, path: entry.fullPath?.slice(1) || file.name });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      // readEntries returns at most 100 entries per call, and none at the end
      const batch = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
      if (!batch.length) break;
      for (const each of batch) await walkOrCount(each);
    }
  };
  const walkOrCount = (entry) =>
    walk(entry).catch(() => {
      unreadable += 1; // a broken link must not fail the whole folder
    });
  for (const entry of entries) await walkOrCount(entry);
  return { files, unreadable };
}

/** {images, skipped}: the images in order, and the number of other files. */
export function filterImages(files) {
  // A file chosen alone is always sent, whatever its name. Hidden files of a folder (.DS_Store, ._img1.png)
  // are not even counted, because the user did not put them there.
  if (files.length === 1) return { images: files, skipped: 0 };
  const visible = files.filter(({ path }) => !/(^|\/)\./.test(path));
  const images = visible.filter(({ file }) => file.type.startsWith("image/") || IMAGE_NAME.test(file.name));
  return { images: images.sort((a, b) => compare(a.path, b.path)), skipped: visible.length - images.length };
}
