//! Images on a web server: beside qemu-img, and from within the daemon's sandbox.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::process::{Launch, Program, installed, workspace_binary};
use harness::web_server::WebServer;

/// Bytes in the file: more than all that is kept of it.
const LENGTH: u32 = 12 << 20;

fn file() -> Vec<u8> {
    (0..LENGTH / 4)
        .flat_map(|at| at.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect()
}

/// Runs a command that is to succeed.
fn succeed(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {said}");
    Ok(())
}

fn is_copy(path: &Path) -> Result<bool> {
    Ok(std::fs::read(path)? == file())
}

#[test]
fn a_copy_from_a_web_server_is_that_of_qemu_img() -> Result<()> {
    let server = WebServer::start(file(), "/")?;
    let directory = tempfile::tempdir()?;
    let copy = directory.path().join("copy.raw");
    let programs = [
        installed("qemu-img", "qemu-utils qemu-block-extra")?,
        workspace_binary("outboard-img")?,
    ];
    for program in programs {
        let mut command = Command::new(&program);
        command.args(["convert", "-f", "raw", "-O", "raw", &server.url("/file")]);
        succeed(command.arg(&copy))?;
        ensure!(is_copy(&copy)?, "{}", program.display());
        std::fs::remove_file(&copy)?;
    }
    Ok(())
}

#[test]
fn a_certificate_of_a_known_authority_is_enough() -> Result<()> {
    let server = WebServer::start_secure(file(), "/")?;
    let directory = tempfile::tempdir()?;
    let (authority, copy) = (
        directory.path().join("ca.pem"),
        directory.path().join("copy.raw"),
    );
    let certificate = server.certificate().context("a secure server has one")?;
    std::fs::write(&authority, certificate)?;
    let mut command = Command::new(workspace_binary("outboard-img")?);
    command.env("SSL_CERT_FILE", &authority);
    command.args(["convert", "-f", "raw", "-O", "raw", &server.url("/file")]);
    succeed(command.arg(&copy))?;
    ensure!(is_copy(&copy)?);
    Ok(())
}

/// Connections that the client makes once it is confined go to the server's port, whose address it has kept.
#[test]
fn a_confined_daemon_reaches_its_web_server() -> Result<()> {
    for is_secure in [false, true] {
        let server = match is_secure {
            true => WebServer::start_secure(file(), "/")?,
            false => WebServer::start(file(), "/")?,
        };
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("nbd.sock");
        let url = server.url("/file");
        let driver = url.split(':').next().unwrap_or_default();
        let options = if is_secure { ",sslverify=off" } else { "" };
        let arguments = [
            "--sandbox".to_owned(),
            "strict".to_owned(),
            "--blockdev".to_owned(),
            format!("{driver},node-name=n,url={url},read-only=on{options}"),
            "--nbd-server".to_owned(),
            format!("addr.type=unix,addr.path={}", socket.display()),
            "--export".to_owned(),
            "nbd,id=e,node-name=n,name=n".to_owned(),
        ];
        let launch = Launch::new(Program::OutboardBlkd, arguments.into(), directory.path());
        let _daemon = launch.start()?;
        let before = server.asked().len();
        let copy = directory.path().join("copy.raw");
        let mut command = Command::new(installed("qemu-img", "qemu-utils")?);
        command.args(["convert", "-f", "raw", "-O", "raw"]);
        command.arg(format!("nbd+unix:///n?socket={}", socket.display()));
        succeed(command.arg(&copy))?;
        ensure!(is_copy(&copy)?, "{url}");
        ensure!(
            server.asked().len() > before,
            "the content came after the start"
        );
    }
    Ok(())
}
