//! A private PostgreSQL server: found on this machine, run under a data
//! directory, stopped with its owner.
//!
//! The server lives exactly as long as this process: it is watched by a shell
//! that holds the reading end of a pipe of ours, so that even a `kill -9` of
//! this process ends in an orderly shutdown of the server. It is reached by a
//! unix socket and a loopback port, both with a password of its own, and it
//! keeps what it has acknowledged (`fsync` stays on).

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use capx_core::domain::digest::{hex, sha256};
use tokio_util::sync::CancellationToken;

use super::Interrupted;

/// The oldest server that capx runs on.
pub const MAJOR_MIN: u32 = 15;
/// How long a server may take to start or to stop; recovery after a crash
/// included.
const PATIENCE: Duration = Duration::from_secs(60);
/// Less free space than this and a server would soon stop with a panic.
const FREE_BYTES_MIN: u64 = 256 * 1024 * 1024;
/// The longest path of a unix socket that every system takes.
const SOCKET_PATH_MAX: usize = 90;
/// How many connections it takes when nothing else is said.
pub const CONNECTIONS: u32 = 120;
const SUPERUSER: &str = "capx";
const DATABASE: &str = "capx";

/// A directory with `postgres` and `initdb` in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binaries {
    /// The directory.
    pub bin: PathBuf,
    /// The major version.
    pub major: u32,
}

impl Binaries {
    /// What a directory holds, if it holds a server.
    pub fn at(bin: &Path) -> Option<Self> {
        if !bin.join("initdb").exists() {
            return None;
        }
        let output = Command::new(bin.join("postgres")).arg("--version").output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().find(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        let major = version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
        Some(Self { bin: bin.to_owned(), major })
    }

    /// Every server of this machine that is new enough, the preferred first:
    /// `CAPX_PG_BIN`, PATH, the usual directories, what an earlier start has
    /// fetched.
    pub fn on_this_machine(fetched: &Path) -> anyhow::Result<Vec<Self>> {
        if let Some(bin) = std::env::var_os("CAPX_PG_BIN") {
            let bin = PathBuf::from(bin);
            let Some(found) = Self::at(&bin) else {
                bail!(
                    "CAPX_PG_BIN={} holds no `postgres` and `initdb`; point it at the bin directory of a PostgreSQL {MAJOR_MIN} or newer",
                    bin.display()
                );
            };
            if found.major < MAJOR_MIN {
                bail!("CAPX_PG_BIN={} is PostgreSQL {}; capx needs {MAJOR_MIN} or newer", bin.display(), found.major);
            }
            return Ok(vec![found]);
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut places: Vec<PathBuf> = std::env::split_paths(&path).collect();
        for (root, tail) in [
            ("/usr/lib/postgresql", "bin"),
            ("/usr/pgsql", "bin"),
            ("/opt/homebrew/opt", "bin"),
            ("/usr/local/opt", "bin"),
            ("/Applications/Postgres.app/Contents/Versions", "bin"),
        ] {
            let mut below: Vec<PathBuf> = fs::read_dir(root)
                .into_iter()
                .flatten()
                .flatten()
                .map(|entry| entry.path())
                .filter(|path| !root.ends_with("opt") || path.to_string_lossy().contains("postgresql"))
                .collect();
            below.sort();
            places.extend(below.into_iter().rev().map(|path| path.join(tail)));
        }
        places.push("/usr/local/pgsql/bin".into());
        places.push(fetched.to_owned());
        let mut found: Vec<Self> = Vec::new();
        for place in places.iter().filter(|place| place.join("postgres").exists()) {
            // The same server by way of a link in PATH is where it really is.
            let real = fs::canonicalize(place.join("postgres")).ok();
            let bin = real.as_deref().and_then(Path::parent).unwrap_or(place);
            if let Some(binaries) = Self::at(bin)
                && binaries.major >= MAJOR_MIN
                && !found.contains(&binaries)
            {
                found.push(binaries);
            }
        }
        Ok(found)
    }
}

/// Who the server runs as: never root, which it refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RunAs {
    uid: u32,
    gid: u32,
}

impl RunAs {
    /// Nobody in particular when we are not root.
    fn find() -> anyhow::Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            return Ok(None);
        }
        let passwd = fs::read_to_string("/etc/passwd").context("as root, the server needs another user to run as")?;
        let user = ["postgres", "nobody"].into_iter().find_map(|name| {
            let mut fields =
                passwd.lines().map(|line| line.split(':')).find(|fields| fields.clone().next() == Some(name))?;
            let uid = fields.nth(2)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(Self { uid, gid })
        });
        match user {
            Some(user) => Ok(Some(user)),
            None => bail!(
                "PostgreSQL refuses to run as root and there is neither a user `postgres` nor `nobody`; start capx as an ordinary user"
            ),
        }
    }

    /// Whether this user can come to a directory, through everything above it.
    fn reaches(self, directory: &Path) -> bool {
        directory.ancestors().filter(|path| path.exists()).all(|path| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(path).is_ok_and(|meta| {
                let mode = meta.mode();
                if meta.uid() == self.uid {
                    mode & 0o100 != 0
                } else if meta.gid() == self.gid {
                    mode & 0o010 != 0
                } else {
                    mode & 0o001 != 0
                }
            })
        })
    }
}

/// How to run a server.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where it keeps everything.
    pub directory: PathBuf,
    /// Settings beyond the defaults, `name=value`.
    pub settings: Vec<String>,
}

/// A running server; dropping it stops it.
#[derive(Debug)]
pub struct Server {
    guard: Child,
    /// Closing it stops the server.
    leash: Option<ChildStdin>,
    home: PathBuf,
    sockets: PathBuf,
    password: String,
    port: u16,
    major: u32,
}

impl Server {
    /// Starts a server with one of the binaries; initializes its directory on
    /// the first start.
    pub fn start(candidates: &[Binaries], options: &Options) -> anyhow::Result<Self> {
        Self::start_unless(candidates, options, &CancellationToken::new())
    }

    /// The same, given up when a stop is asked for.
    pub fn start_unless(candidates: &[Binaries], options: &Options, stop: &CancellationToken) -> anyhow::Result<Self> {
        let run_as = RunAs::find()?;
        let home = home(&options.directory, run_as)?;
        let data = home.join("data");
        let binaries = choose(candidates, &data)?;
        make_directory(&home, run_as)?;
        check_space(&home)?;
        await_predecessor(&data, stop)?;
        let password = password(&home, run_as)?;
        if !data.join("PG_VERSION").exists() {
            initialize(binaries, &home, &data, run_as)?;
        }
        let port = free_port()?;
        let sockets = socket_directory(&home, run_as)?;
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(home.join("server.log"))
            .with_context(|| format!("cannot write {}", home.join("server.log").display()))?;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(GUARD).arg(binaries.bin.join("postgres"));
        command.arg("-D").arg(&data);
        for setting in settings(&sockets, port).into_iter().chain(options.settings.iter().cloned()) {
            command.arg("-c").arg(setting);
        }
        as_user(&mut command, run_as);
        if !sockets.starts_with(&home) {
            command.env("CAPX_SOCKETS", &sockets);
        }
        command
            .current_dir(&home)
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log));
        let mut guard = command.spawn().context("cannot start PostgreSQL")?;
        let leash = guard.stdin.take();
        let mut server = Self { guard, leash, home, sockets, password, port, major: binaries.major };
        server.await_ready(stop)?;
        Ok(server)
    }

    /// The address of its database, by the socket: the nearest way.
    pub fn url(&self) -> String {
        self.url_of(DATABASE)
    }

    /// The address of another of its databases, by the socket.
    pub fn url_of(&self, database: &str) -> String {
        let Self { password, port, sockets, .. } = self;
        let host: String = sockets.to_string_lossy().replace('%', "%25").replace('/', "%2F").replace(' ', "%20");
        format!("postgres://{SUPERUSER}:{password}@{host}:{port}/{database}")
    }

    /// The address of its database by the loopback port, for other programs.
    pub fn tcp_url(&self) -> String {
        format!("postgres://{SUPERUSER}:{}@127.0.0.1:{}/{DATABASE}", self.password, self.port)
    }

    /// Its port on the loopback address.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its major version.
    pub fn major(&self) -> u32 {
        self.major
    }

    /// Where it keeps everything.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Ready when it has written so into its lock file.
    fn await_ready(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let until = Instant::now() + PATIENCE;
        let lock = self.home.join("data/postmaster.pid");
        loop {
            let ready = fs::read_to_string(&lock)
                .is_ok_and(|text| text.lines().nth(3) == Some(&self.port.to_string()) && text.contains("\nready"));
            if ready {
                return Ok(());
            }
            Interrupted::check(stop)?;
            if let Some(status) = self.guard.try_wait()? {
                bail!("PostgreSQL did not start ({status}):\n{}", self.log_tail());
            }
            if Instant::now() > until {
                bail!("PostgreSQL is not ready after {} s:\n{}", PATIENCE.as_secs(), self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(self.home.join("server.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(8)..].join("\n");
        format!("{tail}\n(the whole log: {})", self.home.join("server.log").display())
    }

    /// Stops it in order: what is under way is rolled back, what was
    /// acknowledged is on the disk.
    pub fn stop(&mut self) {
        drop(self.leash.take());
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            match self.guard.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                _ => return,
            }
        }
        let _ = self.guard.kill();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Runs the server `$0` until the reading end of standard input is closed,
/// which the kernel does when our process ends, however it ends. It is told
/// again until it is gone: a server that has only just begun ignores it.
/// Sockets that are not in its home go with it.
const GUARD: &str = r#"
exec 3<&0
"$0" "$@" 3<&- </dev/null & server=$!
( read -r _ <&3; while kill -INT $server 2>/dev/null; do sleep 1; done ) & watch=$!
exec 3<&-
wait $server; code=$?
kill $watch 2>/dev/null
[ -z "$CAPX_SOCKETS" ] || rmdir "$CAPX_SOCKETS"
exit $code
"#;

fn settings(sockets: &Path, port: u16) -> Vec<String> {
    vec![
        "listen_addresses=127.0.0.1".into(),
        format!("port={port}"),
        format!("unix_socket_directories={}", sockets.display()),
        "unix_socket_permissions=0700".into(),
        format!("max_connections={CONNECTIONS}"),
        "shared_buffers=256MB".into(),
        "max_wal_size=4GB".into(),
        "checkpoint_timeout=15min".into(),
        "autovacuum_naptime=15s".into(),
        "log_min_messages=warning".into(),
        "jit=off".into(),
    ]
}

/// Where the server lives: under the wanted directory, or, when we are root
/// and its user cannot come there, in a place of its own under /var/lib.
fn home(directory: &Path, run_as: Option<RunAs>) -> anyhow::Result<PathBuf> {
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let directory = fs::canonicalize(directory)?;
    let Some(user) = run_as else { return Ok(directory.join("postgres")) };
    if user.reaches(&directory) {
        return Ok(directory.join("postgres"));
    }
    let name = hex(&sha256(directory.to_string_lossy().as_bytes())[..6]);
    let home = Path::new("/var/lib/capx").join(format!("dev-{name}"));
    fs::create_dir_all("/var/lib/capx").context("cannot make /var/lib/capx")?;
    fs::set_permissions("/var/lib/capx", fs::Permissions::from_mode(0o755))?;
    Ok(home)
}

fn make_directory(path: &Path, run_as: Option<RunAs>) -> anyhow::Result<()> {
    if !path.exists() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .with_context(|| format!("cannot make {}", path.display()))?;
    }
    if let Some(user) = run_as {
        chown(path, Some(user.uid), Some(user.gid)).with_context(|| format!("cannot give away {}", path.display()))?;
    }
    Ok(())
}

fn as_user(command: &mut Command, run_as: Option<RunAs>) {
    if let Some(user) = run_as {
        command.uid(user.uid).gid(user.gid);
        command.env("HOME", "/");
    }
    command.env("LC_ALL", "C");
}

/// The binaries for a data directory: it can only be read by the major
/// version that made it.
fn choose<'a>(candidates: &'a [Binaries], data: &Path) -> anyhow::Result<&'a Binaries> {
    let Ok(text) = fs::read_to_string(data.join("PG_VERSION")) else {
        return candidates.first().context("no PostgreSQL server");
    };
    let made_by: u32 =
        text.trim().parse().with_context(|| format!("{} is unreadable", data.join("PG_VERSION").display()))?;
    candidates.iter().find(|binaries| binaries.major == made_by).with_context(|| {
        let here: Vec<String> = candidates.iter().map(|b| b.major.to_string()).collect();
        format!(
            "{} was made by PostgreSQL {made_by}, and this machine has {}; install PostgreSQL {made_by} or point CAPX_PG_BIN at it, \
             or begin anew with another --data-dir",
            data.display(),
            if here.is_empty() { "none".into() } else { here.join(", ") },
        )
    })
}

fn check_space(home: &Path) -> anyhow::Result<()> {
    let stat = rustix::fs::statvfs(home).with_context(|| format!("cannot look at {}", home.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if free < FREE_BYTES_MIN {
        bail!(
            "only {} MB are free at {}; make room ({} MB at least) or choose another --data-dir",
            free / 1_000_000,
            home.display(),
            FREE_BYTES_MIN / 1_000_000,
        );
    }
    Ok(())
}

/// A server whose owner was killed shuts down by itself; it has this long.
fn await_predecessor(data: &Path, stop: &CancellationToken) -> anyhow::Result<()> {
    let lock = data.join("postmaster.pid");
    let until = Instant::now() + PATIENCE;
    loop {
        let Ok(text) = fs::read_to_string(&lock) else { return Ok(()) };
        let pid: Option<i32> = text.lines().next().and_then(|line| line.trim().parse().ok());
        let pid = pid.and_then(rustix::process::Pid::from_raw);
        let exists = pid.is_some_and(|pid| rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH));
        let alive = exists && pid.is_some_and(is_postgres);
        if !alive {
            // The server itself takes over a lock whose owner is gone, and
            // checks that nobody is left of it; only a pid that belongs to
            // somebody else by now would mislead it.
            if exists {
                let _ = fs::remove_file(&lock);
            }
            return Ok(());
        }
        Interrupted::check(stop)?;
        if Instant::now() > until {
            bail!(
                "another PostgreSQL (process {}) still uses {}; stop it, or choose another --data-dir",
                text.lines().next().unwrap_or("?"),
                data.display(),
            );
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether a process is a server; where that cannot be told, it may be.
fn is_postgres(pid: rustix::process::Pid) -> bool {
    match fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())) {
        Ok(name) => name.trim() == "postgres",
        Err(_) => !cfg!(target_os = "linux"),
    }
}

/// The server's own password, made once; loopback is open to every user of
/// the machine.
fn password(home: &Path, run_as: Option<RunAs>) -> anyhow::Result<String> {
    let path = home.join("password");
    let mut text = String::new();
    if let Ok(mut file) = fs::File::open(&path) {
        file.read_to_string(&mut text)?;
    }
    if text.trim().is_empty() {
        text = hex(&rand::random::<[u8; 16]>());
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))?;
        file.write_all(text.as_bytes())?;
        if let Some(user) = run_as {
            chown(&path, Some(user.uid), Some(user.gid))?;
        }
    }
    Ok(text.trim().to_owned())
}

fn initialize(binaries: &Binaries, home: &Path, data: &Path, run_as: Option<RunAs>) -> anyhow::Result<()> {
    // Made beside and renamed when it is whole: what an interrupted first
    // start has left is no database yet.
    let whole = data;
    let data = &whole.with_extension("partial");
    if data.exists() {
        fs::remove_dir_all(data).with_context(|| format!("cannot clear {}", data.display()))?;
    }
    let mut command = Command::new(binaries.bin.join("initdb"));
    command
        .arg("-D")
        .arg(data)
        .args(["-U", SUPERUSER, "-A", "scram-sha-256", "-E", "UTF8", "--no-locale", "--no-instructions"])
        .arg(format!("--pwfile={}", home.join("password").display()))
        .current_dir(home)
        .stdin(Stdio::null());
    as_user(&mut command, run_as);
    let output = command.output().with_context(|| format!("cannot run {}", binaries.bin.join("initdb").display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let _ = fs::remove_dir_all(data);
        if said.contains("No space left") {
            bail!("the disk is full at {}; make room or choose another --data-dir", home.display());
        }
        bail!("initdb failed:\n{}", said.trim());
    }
    create_database(binaries, data, run_as)?;
    fs::rename(data, whole).with_context(|| format!("cannot make {}", whole.display()))
}

/// The one database, made before the server listens to anybody.
fn create_database(binaries: &Binaries, data: &Path, run_as: Option<RunAs>) -> anyhow::Result<()> {
    let mut command = Command::new(binaries.bin.join("postgres"));
    command.args(["--single", "-D"]).arg(data).arg("postgres");
    as_user(&mut command, run_as);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(format!("create database {DATABASE}\n").as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let _ = fs::remove_dir_all(data);
        bail!("the database could not be made:\n{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn free_port() -> anyhow::Result<u16> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).context("no loopback port is free")?;
    Ok(listener.local_addr()?.port())
}

/// Sockets in the server's home, or, where that path is too long for one, in
/// a new directory of the temporary one, by a name that nobody can have taken.
/// The guard removes it with the server.
fn socket_directory(home: &Path, run_as: Option<RunAs>) -> anyhow::Result<PathBuf> {
    let sockets = home.join("run");
    if sockets.as_os_str().len() <= SOCKET_PATH_MAX {
        make_directory(&sockets, run_as)?;
        return Ok(sockets);
    }
    let sockets = std::env::temp_dir().join(format!("capx-{}", hex(&rand::random::<[u8; 8]>())));
    // Not if it exists, even as a link: the temporary directory is everybody's.
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&sockets)
        .with_context(|| format!("cannot make {}; choose a shorter --data-dir", sockets.display()))?;
    if let Some(user) = run_as {
        chown(&sockets, Some(user.uid), Some(user.gid))?;
    }
    Ok(sockets)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_needs_the_version_that_made_it() {
        let data = std::env::temp_dir().join(format!("capx-test-{}", capx_core::domain::ids::RunId::new()));
        let new = [Binaries { bin: "/x".into(), major: 17 }, Binaries { bin: "/y".into(), major: 15 }];
        assert_eq!(choose(&new, &data).expect("the first").major, 17);
        fs::create_dir_all(&data).expect("a directory");
        fs::write(data.join("PG_VERSION"), "15\n").expect("a file");
        assert_eq!(choose(&new, &data).expect("its own").major, 15);
        fs::write(data.join("PG_VERSION"), "14\n").expect("a file");
        let said = choose(&new, &data).expect_err("none").to_string();
        assert!(said.contains("made by PostgreSQL 14") && said.contains("17, 15"), "{said}");
        fs::remove_dir_all(&data).expect("clean");
    }

    #[test]
    fn sockets_for_a_long_path_have_a_directory_that_is_new_and_private() {
        let home = Path::new("/x").join("y".repeat(SOCKET_PATH_MAX));
        let (one, other) = (socket_directory(&home, None).expect("one"), socket_directory(&home, None).expect("other"));
        assert_ne!(one, other);
        for sockets in [one, other] {
            assert!(sockets.as_os_str().len() <= SOCKET_PATH_MAX);
            assert_eq!(fs::metadata(&sockets).expect("it is there").permissions().mode() & 0o777, 0o700);
            fs::remove_dir(&sockets).expect("clean");
        }
    }
}
