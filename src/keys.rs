//! `capx keys`: API keys, straight on the database, for whoever runs the
//! server.

use anyhow::{Context, bail};
use capx_core::domain::ids::{AccountId, CompanyId, KeyId};
use capx_core::domain::key::{ApiKey, SCOPES};
use capx_core::store::tenants::{self, NewKey};
use clap::Subcommand;
use rand::Rng;
use serde_json::json;
use sqlx::PgPool;

/// The account when none is named.
const DEFAULT_ACCOUNT: &str = "default";

/// `capx keys …`
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key and show it, this once.
    Create {
        /// For people, to tell keys apart.
        #[arg(long)]
        name: String,
        /// The account; made when it is new.
        #[arg(long, default_value = DEFAULT_ACCOUNT)]
        account: String,
        /// Bind the key to one company (co_…).
        #[arg(long)]
        company: Option<CompanyId>,
        /// What it may do, parted by commas; everything without.
        #[arg(long, value_delimiter = ',', default_value = "*")]
        scopes: Vec<String>,
        /// A sandbox key: spends no credits.
        #[arg(long)]
        test: bool,
        /// The tier of a new account.
        #[arg(long, default_value = "pro", value_parser = ["starter", "pro", "enterprise"])]
        tier: String,
        /// One JSON object with `id` and `key`.
        #[arg(long)]
        json: bool,
    },
    /// List the keys, masked.
    List {
        /// One JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Revoke a key for good.
    Revoke {
        /// The key's id (key_…).
        id: KeyId,
    },
}

/// A key that has just been made.
#[derive(Debug)]
pub struct Made {
    /// Its id.
    pub id: KeyId,
    /// The key itself.
    pub key: String,
}

/// Makes a key of an account.
pub async fn make(
    pool: &PgPool,
    account: AccountId,
    company: Option<CompanyId>,
    name: &str,
    live: bool,
    scopes: &[String],
) -> anyhow::Result<Made> {
    // A generator seeded by the operating system, which is what it takes for
    // 220 bits that nobody can guess.
    let key = ApiKey::generate(live, |below| rand::rng().random_range(0..below));
    let hint = key.hint();
    let new = NewKey { account, company, name, hash: key.hash(), hint: &hint, live, scopes };
    let mut tx = pool.begin().await?;
    let id = capx_core::engine::keys::create(&mut tx, &new).await?;
    tx.commit().await?;
    Ok(Made { id, key: key.reveal().to_owned() })
}

/// Runs a command.
#[expect(clippy::print_stdout, reason = "the command's output")]
pub async fn run(pool: &PgPool, command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create { name, account, company, scopes, test, tier, json } => {
            if let Some(unknown) = scopes.iter().find(|scope| !SCOPES.contains(&scope.as_str())) {
                bail!("unknown scope `{unknown}`; the scopes are {}", SCOPES.join(", "));
            }
            let account = tenants::account(pool, &account, &tier).await?;
            if let Some(company) = company {
                tenants::company(pool, account, None, company)
                    .await?
                    .with_context(|| format!("the account has no company {company}"))?;
            }
            let made = make(pool, account, company, &name, !test, &scopes).await?;
            if json {
                println!("{}", json!({"id": made.id, "key": made.key}));
            } else {
                println!("{}", made.key);
                println!("id {}; the key is shown this once, keep it safe", made.id);
            }
            Ok(())
        }
        KeysCommand::List { json } => {
            let keys = tenants::list_keys(pool).await?;
            if json {
                let keys: Vec<_> = keys
                    .iter()
                    .map(|k| json!({"id": k.key, "name": k.name, "account": k.account, "key": k.hint, "scopes": k.scopes, "revoked": k.revoked}))
                    .collect();
                println!("{}", serde_json::Value::Array(keys));
                return Ok(());
            }
            let mut table = comfy_table::Table::new();
            table.load_style(comfy_table::presets::NOTHING);
            table.set_header(["ID", "NAME", "ACCOUNT", "KEY", "SCOPES", ""]);
            for key in keys {
                let state = if key.revoked { "revoked" } else { "" };
                table.add_row([
                    key.key.to_string(),
                    key.name,
                    key.account,
                    key.hint,
                    key.scopes.join(","),
                    state.to_owned(),
                ]);
            }
            println!("{table}");
            Ok(())
        }
        KeysCommand::Revoke { id } => {
            if !tenants::revoke_key(pool, id).await? {
                bail!("there is no active key {id}");
            }
            println!("revoked {id}");
            Ok(())
        }
    }
}
