//! What goes in and out of a sandbox: a length, a head in JSON, then the files' bytes.

use std::io::{self, Read};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::limits::{FILES_BYTES_MAX, FILES_MAX};

/// The longest message, in bytes: the files, and as much again of heads and prints.
pub const MESSAGE_BYTES_MAX: u64 = FILES_BYTES_MAX + HEAD_BYTES_MAX;
const HEAD_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// A file, by its path in the workspace.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct File {
    /// Relative, without `..`.
    pub path: String,
    /// How many of the bytes that follow are its.
    pub size: u64,
    /// Its bytes.
    #[serde(skip)]
    pub bytes: Vec<u8>,
}

impl File {
    /// A file of bytes.
    pub fn new(path: String, bytes: Vec<u8>) -> Self {
        Self { path, size: bytes.len() as u64, bytes }
    }
}

/// What is to be run.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Order {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// What it reads.
    pub stdin: String,
    /// How long it may run, in milliseconds.
    pub millis: u64,
    /// The files that it finds in its directory.
    pub files: Vec<File>,
}

/// What came of it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Why it was not run.
    pub refused: Option<String>,
    /// What it ended with; nothing where a signal ended it.
    pub exit_code: Option<i32>,
    /// What ended it.
    pub signal: Option<i32>,
    /// Its time was over.
    pub timed_out: bool,
    /// What it printed.
    pub stdout: Printed,
    /// What it complained of.
    pub stderr: Printed,
    /// The files that it has made or changed.
    pub files: Vec<File>,
    /// Those that it has removed.
    pub removed: Vec<String>,
    /// What it left that cannot be kept, and why.
    pub left: Vec<String>,
}

/// What came over a pipe.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Printed {
    /// The first of it.
    pub text: String,
    /// There was more.
    pub cut: bool,
    /// There was so much that the program was ended.
    pub flooded: bool,
}

/// A head that files follow.
pub trait Head: Serialize + DeserializeOwned {
    /// Those files.
    fn files_mut(&mut self) -> &mut Vec<File>;
}

impl Head for Order {
    fn files_mut(&mut self) -> &mut Vec<File> {
        &mut self.files
    }
}

impl Head for Report {
    fn files_mut(&mut self) -> &mut Vec<File> {
        &mut self.files
    }
}

/// As bytes.
///
/// # Errors
/// Where it is too large.
pub fn pack(head: &impl Head, files: &[File]) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(head)?;
    let total = files.iter().map(|file| file.size).sum::<u64>();
    if files.len() > FILES_MAX || total > FILES_BYTES_MAX || json.len() as u64 > HEAD_BYTES_MAX - 8 {
        let limit = FILES_BYTES_MAX / (1024 * 1024);
        return Err(io::Error::other(format!(
            "a program takes at most {FILES_MAX} files of {limit} MiB in all; the workspace has more"
        )));
    }
    let mut packed = (json.len() as u64).to_be_bytes().to_vec();
    packed.extend(json);
    files.iter().for_each(|file| packed.extend(&file.bytes));
    Ok(packed)
}

/// From bytes that nobody vouches for.
///
/// # Errors
/// Where they end early, or claim more than there may be.
pub fn unpack<T: Head>(from: &mut impl Read) -> io::Result<T> {
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let mut head: T = serde_json::from_slice(&take(from, u64::from_be_bytes(length), HEAD_BYTES_MAX)?)?;
    let mut room = FILES_BYTES_MAX;
    if head.files_mut().len() > FILES_MAX {
        return Err(io::Error::other("more files than there may be"));
    }
    for file in head.files_mut() {
        file.bytes = take(from, file.size, room)?;
        room -= file.size;
    }
    Ok(head)
}

fn take(from: &mut impl Read, length: u64, limit: u64) -> io::Result<Vec<u8>> {
    if length > limit {
        return Err(io::Error::other("more than a message may hold"));
    }
    let mut bytes = Vec::new();
    from.take(length).read_to_end(&mut bytes)?;
    if bytes.len() as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_and_what_lies_is_refused() {
        let order = Order {
            argv: vec!["sh".into()],
            files: vec![File::new("a".into(), vec![0, 255]), File::new("b/c".into(), vec![])],
            ..Order::default()
        };
        let packed = pack(&order, &order.files).expect("packs");
        let back: Order = unpack(&mut packed.as_slice()).expect("unpacks");
        assert_eq!((back.argv, back.files[0].bytes.as_slice(), back.files.len()), (order.argv, &[0, 255][..], 2));
        assert!(unpack::<Order>(&mut &packed[..packed.len() - 1]).is_err());
        let mut lies = packed;
        lies[0] = 255;
        assert!(unpack::<Order>(&mut lies.as_slice()).is_err());
    }
}
