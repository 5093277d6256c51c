//! Whole `capx` processes, started, signalled and killed.

use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Db, eventually};

/// A `capx` process; killed when dropped.
pub struct Process {
    pub child: Child,
    /// What it says on stderr.
    said: File,
}

impl Process {
    pub fn start(db: &Db, args: &[&str], failpoints: &str) -> Self {
        Self::start_with(db, args, &[("CAPX_FAILPOINTS", failpoints)])
    }

    /// The same with some of its environment otherwise.
    pub fn start_with(db: &Db, args: &[&str], environment: &[(&str, &str)]) -> Self {
        let said = tempfile();
        let child = Command::new(env!("CARGO_BIN_EXE_capx"))
            .args(args)
            .env("CAPX_DATABASE_URL", &db.url)
            .env("CAPX_LEASE", std::env::var("CAPX_LEASE").unwrap_or_else(|_| "1500ms".into()))
            .env("CAPX_DRAIN", "300ms")
            .env("CAPX_OFFLINE_MODEL", "1")
            .env("CAPX_EGRESS_ALLOW", "127.0.0.0/8")
            .env("CAPX_ALLOW_UNSAFE_DATABASE", "1")
            .env("CAPX_WORKSPACE", &db.files)
            .env("CAPX_SECRETS_KEY_FILE", &db.keys)
            .env("CAPX_LOG", "info")
            .env("CAPX_LOG_FORMAT", "json")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // A file and not a pipe, which would block a talkative process.
            .stderr(Stdio::from(said.try_clone().unwrap()))
            .spawn()
            .unwrap();
        Self { child, said }
    }

    pub fn worker(db: &Db, failpoints: &str) -> Self {
        Self::start(db, &["worker", "--concurrency", "8"], failpoints)
    }

    /// Kills it; whether it was at a point before.
    pub fn met(mut self, point: &str) -> bool {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.said().contains(&format!("failpoint fired: {point}"))
    }

    /// Kills it, and asserts that it was at a point before.
    pub fn was_at(mut self, point: &str) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.said();
        assert!(said.contains(&format!("failpoint fired: {point}")), "{point} was not reached:\n{said}");
    }

    /// Waits until it has died at its point, and asserts that it was there.
    pub async fn dies_at(mut self, point: &str) {
        eventually("the process to die", || {
            let ended = self.child.try_wait().unwrap().is_some();
            async move { ended }
        })
        .await;
        let said = self.said();
        assert!(said.contains(&format!("failpoint fired: {point}")), "{point} was not reached:\n{said}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    pub fn said(&mut self) -> String {
        let mut said = String::new();
        self.said.rewind().unwrap();
        self.said.read_to_string(&mut said).unwrap();
        said
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        // Gone already is as good.
        let _ = kill_process(pid, signal);
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self) {
        eventually("the process to end", || {
            let ended = self.child.try_wait().unwrap().is_some();
            async move { ended }
        })
        .await;
    }
}

/// A file without a name.
fn tempfile() -> File {
    let path = std::env::temp_dir().join(format!("capx-it-said-{}", uuid::Uuid::now_v7()));
    let file = File::options().read(true).append(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

/// An address nobody uses at the moment.
pub fn free_address() -> String {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// An API process that answers; its address and a client.
pub async fn api(db: &Db, bind: &str, failpoints: &str) -> (Process, reqwest::Client) {
    let api = Process::start(db, &["api", "--bind", bind], failpoints);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let ready = format!("http://{bind}/readyz");
    eventually("the API", || async { client.get(&ready).send().await.is_ok_and(|r| r.status().is_success()) }).await;
    (api, client)
}
