// What was dropped or chosen: files with their paths, in the order people count in.

const IMAGE = /\.(png|jpe?g|tiff?|webp|bmp|gif)$/i;
const { compare } = new Intl.Collator(undefined, { numeric: true }); // img2 before img10

/** Of a list of files, as an <input> gives it; those of a folder know their paths. */
export const ofList = (files) => [...files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));

/** Of a drop, folders walked through: {files, unread}, the latter a count. */
export async function ofDrop(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return { files: ofList(transfer.files), unread: 0 };
  const files = [];
  let unread = 0;
  const walk = async (entry) => {
    if (entry.isFile) {
      const file = await new Promise((done, failed) => entry.file(done, failed));
      files.push({ file, path: entry.fullPath?.slice(1) || file.name });
      return;
    }
    const reader = entry.createReader();
    for (;;) {
      const batch = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!batch.length) break; // it gives at most a hundred at a time
      for (const each of batch) await tryTo(each);
    }
  };
  const tryTo = (entry) =>
    walk(entry).catch(() => {
      unread += 1; // a broken link must not cost the folder
    });
  for (const entry of entries) await tryTo(entry);
  return { files, unread };
}

/** {images, others}: the images in order, and how many other files there were. */
export function sift(files) {
  // what somebody picked alone is meant; of several, hidden files are the system's, not theirs
  const meant = files.length === 1 ? files : files.filter(({ path }) => !/(^|\/)\./.test(path));
  const images =
    files.length === 1
      ? files
      : meant.filter(({ file }) => file.type.startsWith("image/") || IMAGE.test(file.name));
  return { images: images.sort((a, b) => compare(a.path, b.path)), others: meant.length - images.length };
}
