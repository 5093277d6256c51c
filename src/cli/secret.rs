//! `capx secret …`

use std::io::{IsTerminal, Read, stdin};
use std::path::PathBuf;

use anyhow::{Context, bail};
use capx_core::domain::secret::VALUE_BYTES_MAX;
use capx_core::domain::secret::seal;
use clap::Subcommand;
use serde_json::json;

use super::client::{Client, ServerArgs, list, part};
use super::exit::{Exit, WRONG};
use super::show;
use crate::out;
use crate::serve::{self, DatabaseArgs};

/// `capx secret …`
#[derive(Debug, Subcommand)]
pub enum SecretCommand {
    /// Set a secret: its value is read from stdin, where no list of processes shows it.
    Set {
        /// What playbooks call it, such as STRIPE_KEY.
        name: String,
        /// Read it from this file.
        #[arg(long)]
        file: Option<PathBuf>,
    },
    /// List the names of the company's secrets.
    List {
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Delete a secret.
    Delete {
        /// What playbooks call it.
        name: String,
    },
    /// Print a new key that seals secrets, for CAPX_SECRETS_KEY_FILE.
    Key,
    /// Seal all secrets with the first of the keys, straight on the database; then the
    /// others can go.
    Reseal {
        /// Where they are.
        #[command(flatten)]
        database: DatabaseArgs,
    },
}

/// Runs a command.
pub async fn run(server: ServerArgs, command: SecretCommand) -> anyhow::Result<()> {
    match command {
        SecretCommand::Set { name, file } => {
            let value = match file {
                Some(file) => std::fs::read_to_string(&file)
                    .map_err(|error| Exit::with(WRONG, format!("cannot read {}: {error}", file.display())))?,
                None => given()?,
            };
            // A shell's `echo` and an editor end what they write.
            let value =
                value.strip_suffix('\n').map(|value| value.strip_suffix('\r').unwrap_or(value)).unwrap_or(&value);
            let client = Client::new(server)?;
            let path = format!("{}/secrets", client.company().await?);
            let set = &client.post(&path, json!({"name": name, "value": value})).await?["data"];
            out::line(format_args!("set {}", show::text(set, "name")));
        }
        SecretCommand::List { json } => {
            let client = Client::new(server)?;
            let secrets = client.pages(&format!("{}/secrets", client.company().await?), "").await?;
            if json {
                show::json(&secrets);
                return Ok(());
            }
            let row =
                |of: &serde_json::Value| ["name", "updated_at", "updated_by", "key_id"].map(|key| show::text(of, key));
            let rows = list(&secrets).iter().map(row).collect();
            show::table(["NAME", "SET", "BY", "KEY"], rows, "there is no secret yet");
        }
        SecretCommand::Delete { name } => {
            let client = Client::new(server)?;
            client.delete(&format!("{}/secrets/{}", client.company().await?, part(&name))).await?;
            out::line(format_args!("deleted {name}"));
        }
        SecretCommand::Key => out::line(seal::new_key()?),
        SecretCommand::Reseal { database } => {
            let (done, key) = serve::reseal(&database).await?;
            out::line(format_args!("sealed {done} with {key}"));
        }
    }
    Ok(())
}

/// What is typed unseen, or comes through a pipe.
fn given() -> anyhow::Result<String> {
    let stdin = stdin();
    if stdin.is_terminal() {
        out::aside("type the secret, unseen, and press Enter");
        let _unseen = Unseen::begin()?;
        let mut line = String::new();
        stdin.read_line(&mut line).context("cannot read the secret")?;
        return Ok(line);
    }
    let mut value = String::new();
    let most = u64::try_from(VALUE_BYTES_MAX + 3).unwrap_or(u64::MAX);
    stdin
        .lock()
        .take(most)
        .read_to_string(&mut value)
        .map_err(|error| Exit::with(WRONG, format!("the secret cannot be read: {error}")))?;
    if value.is_empty() {
        bail!(Exit::with(WRONG, "nothing came from stdin: write `printf %s \"$TOKEN\" | capx secret set NAME`"));
    }
    Ok(value)
}

/// A terminal that shows nothing of what is typed, until this is dropped.
struct Unseen(rustix::termios::Termios);

impl Unseen {
    fn begin() -> anyhow::Result<Self> {
        use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};
        let before = tcgetattr(stdin()).context("cannot ask the terminal")?;
        let mut unseen = before.clone();
        unseen.local_modes.remove(LocalModes::ECHO);
        tcsetattr(stdin(), OptionalActions::Flush, &unseen).context("cannot hide what is typed")?;
        Ok(Self(before))
    }
}

impl Drop for Unseen {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(stdin(), rustix::termios::OptionalActions::Flush, &self.0);
    }
}
