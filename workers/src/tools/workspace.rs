//! A run's own directory. No path leads out of it: the kernel resolves it
//! beneath the directory and refuses every symbolic link on the way, so there
//! is no race between a check and a use (hazard S15).

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use capx_core::domain::artifact::ARTIFACT_BYTES_MAX;
use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::outcome::Failure;

/// The largest file that a step reads or writes, in bytes.
pub const FILE_BYTES_MAX: usize = ARTIFACT_BYTES_MAX;
/// The longest path, in bytes, and its most parts.
pub const PATH_BYTES_MAX: usize = 1_024;
const PATH_PARTS_MAX: usize = 32;
/// How a file's name begins that is being written.
pub const TEMPORARY: &str = ".capx-";

/// Where all runs keep their files.
#[derive(Debug, Clone)]
pub struct Workspaces {
    root: PathBuf,
}

/// Where one run keeps its files.
#[derive(Debug)]
pub struct Workspace {
    directory: PathBuf,
}

impl Workspaces {
    /// Under a directory, which is made when it is needed.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// A run's own.
    pub fn of(&self, company: CompanyId, run: RunId) -> Workspace {
        Workspace { directory: self.root.join(company.to_string()).join(run.to_string()) }
    }
}

/// The parts of a relative path inside a workspace.
fn parts(path: &str) -> Result<Vec<&str>, Failure> {
    let bad = |why: &str| Err(Failure::invalid(format!("the path `{}` {why}", path.escape_debug())));
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return bad("is empty or too long");
    }
    if path.starts_with('/') {
        return bad("is absolute; paths are relative to the run's workspace");
    }
    if path.chars().any(char::is_control) {
        return bad("holds a control character");
    }
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.is_empty() || parts.len() > PATH_PARTS_MAX || path.ends_with('/') {
        return bad("names no file");
    }
    if parts.contains(&"..") {
        return bad("leads out of the run's workspace");
    }
    Ok(parts)
}

/// A file of a workspace.
#[derive(Debug)]
pub struct WorkspaceFile {
    file: File,
    path: String,
    /// How many bytes it has.
    pub bytes: usize,
}

impl WorkspaceFile {
    /// Its bytes.
    pub fn read(self) -> Result<Vec<u8>, Failure> {
        let path = &self.path;
        let too_large = || Failure::invalid(format!("`{path}` is larger than {FILE_BYTES_MAX} bytes"));
        if self.bytes > FILE_BYTES_MAX {
            return Err(too_large());
        }
        let mut bytes = Vec::with_capacity(self.bytes);
        self.file
            .take(FILE_BYTES_MAX as u64 + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| Failure::transient(format!("`{path}`: {error}")))?;
        if bytes.len() > FILE_BYTES_MAX {
            return Err(too_large());
        }
        Ok(bytes)
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsFd, OwnedFd};

    use capx_core::domain::outcome::{ErrorClass, Failure};
    use rustix::fs::{
        AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2, renameat, unlinkat,
    };
    use rustix::io::Errno;

    use super::{FILE_BYTES_MAX, PATH_PARTS_MAX, TEMPORARY, Workspace, WorkspaceFile, parts};

    const BENEATH: ResolveFlags =
        ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
    const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);

    fn failure(path: &str, error: Errno) -> Failure {
        let path = path.escape_debug();
        match error {
            Errno::NOENT => Failure::invalid(format!("there is no file `{path}` in the run's workspace")),
            Errno::LOOP | Errno::XDEV => Failure::new(
                ErrorClass::Governance,
                format!("the path `{path}` leads through a link or out of the run's workspace"),
            ),
            Errno::ISDIR | Errno::NOTDIR | Errno::EXIST => {
                Failure::invalid(format!("the path `{path}` is no regular file"))
            }
            Errno::NOSPC | Errno::DQUOT => Failure::transient(format!("no space left for `{path}`")),
            other => Failure::transient(format!("`{path}`: {other}")),
        }
    }

    impl Workspace {
        fn open(&self) -> Result<OwnedFd, Failure> {
            std::fs::create_dir_all(&self.directory)
                .map_err(|error| Failure::transient(format!("the run has no workspace: {error}")))?;
            openat(CWD, &self.directory, DIRECTORY, Mode::empty()).map_err(|e| failure(".", e))
        }

        /// A file, to be read.
        pub fn file(&self, path: &str) -> Result<WorkspaceFile, Failure> {
            let relative = parts(path)?.join("/");
            let root = self.open()?;
            // Not blocking: a FIFO must not hang the worker.
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file =
                openat2(&root, relative.as_str(), flags, Mode::empty(), BENEATH).map_err(|e| failure(path, e))?;
            let stat = fstat(&file).map_err(|e| failure(path, e))?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                return Err(failure(path, Errno::ISDIR));
            }
            let bytes = usize::try_from(stat.st_size).unwrap_or(usize::MAX);
            Ok(WorkspaceFile { file: File::from(file), path: path.to_owned(), bytes })
        }

        /// The paths of the regular files that there are, at most so many.
        pub fn paths(&self, most: usize) -> Result<Vec<String>, Failure> {
            self.open()?;
            let mut found = Vec::new();
            let mut within = vec![(self.directory.clone(), String::new(), 0)];
            while let Some((directory, above, depth)) = within.pop() {
                let entries = std::fs::read_dir(&directory)
                    .map_err(|error| Failure::transient(format!("the workspace: {error}")))?;
                for entry in entries.flatten() {
                    let name = entry.file_name();
                    let (Some(name), Ok(kind)) = (name.to_str(), entry.file_type()) else { continue };
                    let path = if above.is_empty() { name.to_owned() } else { format!("{above}/{name}") };
                    if kind.is_dir() && depth < PATH_PARTS_MAX {
                        within.push((entry.path(), path, depth + 1));
                    } else if kind.is_file() && !name.starts_with(TEMPORARY) {
                        found.push(path);
                    }
                    if found.len() > most {
                        return Err(Failure::invalid(format!("the workspace holds more than {most} files")));
                    }
                }
            }
            found.sort();
            Ok(found)
        }

        /// Removes a file, and the directories that are empty without it; nothing, where there
        /// is none.
        pub fn remove(&self, path: &str) -> Result<(), Failure> {
            let parts = parts(path)?;
            let root = self.open()?;
            for length in (1..=parts.len()).rev() {
                let (above, flags) = (
                    parts[..length - 1].join("/"),
                    match length == parts.len() {
                        true => AtFlags::empty(),
                        false => AtFlags::REMOVEDIR,
                    },
                );
                let opened = match above.is_empty() {
                    true => openat(&root, ".", DIRECTORY, Mode::empty()),
                    false => openat2(&root, above.as_str(), DIRECTORY, Mode::empty(), BENEATH),
                };
                match opened.and_then(|directory| unlinkat(&directory, parts[length - 1], flags)) {
                    Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => {}
                    Err(Errno::NOTEMPTY) if length < parts.len() => return Ok(()),
                    Err(error) => return Err(failure(path, error)),
                }
            }
            Ok(())
        }

        /// Writes a file whole: a reader sees the old or the new one, and a
        /// crash leaves no half.
        pub fn write(&self, path: &str, bytes: &[u8], key: &str) -> Result<(), Failure> {
            if bytes.len() > FILE_BYTES_MAX {
                return Err(Failure::invalid(format!(
                    "the content is {} bytes, over the limit of {FILE_BYTES_MAX}",
                    bytes.len()
                )));
            }
            let parts = parts(path)?;
            let Some((name, above)) = parts.split_last() else { return Err(failure(path, Errno::NOENT)) };
            let mut directory = self.open()?;
            for part in above {
                match mkdirat(&directory, *part, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(failure(path, error)),
                }
                directory =
                    openat2(&directory, *part, DIRECTORY, Mode::empty(), BENEATH).map_err(|e| failure(path, e))?;
            }
            // An attempt that ran out of time may still be writing.
            let temporary = format!("{TEMPORARY}{key}-{:08x}", rand::random::<u32>());
            let written = write_and_rename(&directory, &temporary, name, bytes);
            if written.is_err() {
                let _ = unlinkat(&directory, temporary.as_str(), AtFlags::empty());
            }
            written.map_err(|e| failure(path, e))
        }
    }

    fn write_and_rename(directory: impl AsFd, temporary: &str, name: &str, bytes: &[u8]) -> Result<(), Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = openat(&directory, temporary, flags, Mode::from_raw_mode(0o644))?;
        let io = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(io)?;
        file.sync_all().map_err(io)?;
        renameat(&directory, temporary, &directory, name)
    }
}

#[cfg(not(target_os = "linux"))]
impl Workspace {
    /// Refused: only Linux can hold a path inside its directory.
    pub fn file(&self, path: &str) -> Result<WorkspaceFile, Failure> {
        parts(path)?;
        Err(Failure::invalid("file tools need Linux"))
    }

    /// Refused: only Linux can hold a path inside its directory.
    pub fn paths(&self, _: usize) -> Result<Vec<String>, Failure> {
        Err(Failure::invalid("file tools need Linux"))
    }

    /// Refused: only Linux can hold a path inside its directory.
    pub fn remove(&self, path: &str) -> Result<(), Failure> {
        parts(path)?;
        Err(Failure::invalid("file tools need Linux"))
    }

    /// Refused: only Linux can hold a path inside its directory.
    pub fn write(&self, path: &str, _: &[u8], _: &str) -> Result<(), Failure> {
        parts(path)?;
        Err(Failure::invalid("file tools need Linux"))
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    struct Scratch(PathBuf);

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn workspace() -> (Scratch, Workspace) {
        let root = std::env::temp_dir().join(format!("capx-test-{}", RunId::new()));
        let workspace = Workspaces::new(root.clone()).of(CompanyId::new(), RunId::new());
        (Scratch(root), workspace)
    }

    fn read(workspace: &Workspace, path: &str) -> Result<Vec<u8>, Failure> {
        workspace.file(path)?.read()
    }

    #[test]
    fn writes_and_reads_in_directories() {
        let (_scratch, workspace) = workspace();
        workspace.write("a/b/c.txt", b"one", "k").expect("writes");
        workspace.write("a/b/c.txt", b"two", "k").expect("writes again");
        assert_eq!(read(&workspace, "./a//b/c.txt").expect("reads"), b"two");
        assert!(read(&workspace, "a/b/d.txt").expect_err("no file").message.contains("there is no file"));
        assert_eq!(std::fs::read_dir(workspace.directory.join("a/b")).expect("a directory").count(), 1);
    }

    #[test]
    fn no_path_leads_out() {
        let (_scratch, workspace) = workspace();
        workspace.write("inside", b"x", "k").expect("writes");
        let root = &workspace.directory;
        symlink("/etc", root.join("etc")).expect("a link");
        symlink("/etc/passwd", root.join("passwd")).expect("a link");
        symlink("inside", root.join("alias")).expect("a link");
        for path in ["../x", "a/../../x", "/etc/passwd", "etc/passwd", "passwd", "alias", "", "a/", ".", "x\0y", "x\ny"]
        {
            assert!(read(&workspace, path).is_err(), "{path:?}");
        }
        for path in ["../x", "etc/x", "/tmp/x", "etc", "a/"] {
            let written = workspace.write(path, b"x", "k");
            // A link that is replaced by the file itself has led nowhere.
            assert!(written.is_err() || path == "etc", "{path:?}");
        }
        assert!(!std::path::Path::new("/etc/x").exists());
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("fifo"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o644),
            0,
        )
        .expect("a fifo");
        assert!(read(&workspace, "fifo").is_err());
    }

    #[test]
    fn sizes_are_bounded() {
        let (_scratch, workspace) = workspace();
        assert!(workspace.write("big", &vec![0; FILE_BYTES_MAX + 1], "k").is_err());
        workspace.write("small", b"x", "k").expect("writes");
        std::fs::File::options()
            .write(true)
            .open(workspace.directory.join("small"))
            .expect("opens")
            .set_len(1 << 40)
            .expect("a sparse terabyte");
        assert!(read(&workspace, "small").expect_err("too big").message.contains("larger than"));
    }
}
