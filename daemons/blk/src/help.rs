//! Texts of `--help`.

/// The manual.
pub(crate) const HELP: &str = "\
Usage: outboard-blkd [options]
Serves disk images to virtual machines over vhost-user, driven by QMP.

Options run in the order given. A value is key=value[,key=value...] with dots for
nested keys (file.driver=file), numbers for list items (iothread.0=a) and ,, for a
comma, or a JSON object. Everything that an option makes can also be made and
removed over QMP while the daemon runs.

  -h, --help             display this help and exit
  -V, --version          display the version and exit
  -T, --trace [enable=]<pattern>[,events=<file>][,file=<file>]
                         log everything that parts of the program do. 'help' lists the
                         parts; <pattern> may hold * and ?; the log goes to <file>

  --blockdev [driver=]<driver>,node-name=<N>
             [,read-only=on|off][,auto-read-only=on|off][,force-share=on|off]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,discard=ignore|unmap][,detect-zeroes=on|off|unmap]
             [,driver specific parameters...]
                         add a block node (QMP: blockdev-add)
      file               filename=<path>[,locking=auto|on|off][,drop-cache=on|off]
      http, https        url=<address>[,readahead=<bytes>][,timeout=<s>]
                         [,username=<name>][,password-secret=<secret>]
                         [,cookie=<text>|,cookie-secret=<secret>]
                         [,sslverify=on|off]
                         a file of a web server, with read-only=on
      nbd                server.type=unix,server.path=<path> or
                         server.type=inet,server.host=<host>,server.port=<port>
                         (with server.abstract=on a name without a file; also
                         server.type=vsock,server.cid=<n>,server.port=<n>)
                         [,export=<name>][,reconnect-delay=<s>]
                         [,open-timeout=<s>][,x-dirty-bitmap=<context>]
      null-co, null-aio  size=<bytes>[,read-zeroes=on|off][,latency-ns=<n>]
      raw                file=<node or definition>[,offset=<n>][,size=<n>]
      qcow2              file=<node or definition>[,backing=<node or definition>]
                         [,encrypt.format=luks|aes,encrypt.key-secret=<secret>]
                         [,l2-cache-size=<n>][,refcount-cache-size=<n>]
                         Names inside images open only plain files beneath the
                         directory of the image or beneath an --allow-dir,
                         or drivers of --allow-drivers <name>[,<name>...]
      copy-on-read       file=<node or definition>[,bottom=<node>]
                         what is read from backing files is kept in the image
      throttle           file=<node or definition>,throttle-group=<id>
                         requests wait for the limits of a group
      preallocate        file=<node or definition>[,prealloc-size=<bytes>]
                         [,prealloc-align=<bytes>]
      quorum             children.<i>=<node or definition>,vote-threshold=<n>
                         [,read-pattern=quorum|fifo][,rewrite-corrupted=on|off]
                         [,blkverify=on|off]
      blkverify          raw=<node or definition>,test=<node or definition>
      blklogwrites       file=<node or definition>,log=<node or definition>
                         [,log-sector-size=<bytes>][,log-append=on|off]
                         [,log-super-update-interval=<n>]

  --object iothread,id=<id>[,poll-max-ns=<n>]
                         add a thread for queues of exports (QMP: object-add);
                         poll-max-ns=0 never polls. 'help' lists object types
  --object throttle-group,id=<id>[,limits.<bps|iops>-<total|read|write>=<n>]
           [,limits....-max=<n>][,limits....-max-length=<seconds>]
           [,limits.iops-size=<bytes>]
                         add limits that throttle nodes share: bytes and
                         operations a second, with bursts (-max) of some seconds.
                         QMP changes them (qom-set)
  --object secret,id=<id>,file=<path>[,format=raw|base64]
           [,keyid=<secret>,iv=<base64>]
                         add a password or key; with keyid= it is encrypted
                         with another one (AES-256-CBC)

  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>,
           addr.type=unix,addr.path=<path>[,server=on|off]
           [,writable=on|off][,num-queues=<n>][,queue-size=<n>]
           [,logical-block-size=<bytes>][,serial=<text>]
           [,iothread=<id> | ,iothread.0=<id>,iothread.1=<id>...]
                         export a node as a virtio-blk disk (QMP:
                         block-export-add). The socket listens; with server=off
                         the daemon connects to a front-end that listens. Queue
                         i is served by iothread i modulo their number
  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>,
           addr.type=fd,addr.str=<number or name>[,...]
                         the same on a listening socket that was handed over:
                         an inherited descriptor by number, or one of systemd
                         socket activation by its FileDescriptorName=

  --nbd-server addr.type=unix,addr.path=<path>
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>
               [,tls-creds=<id>][,tls-authz=<id>][,max-connections=<n>]
                         serve the exports of type nbd that follow (QMP:
                         nbd-server-start). In the sandbox, later servers listen on
                         unix sockets in directories of earlier ones only
  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<name>]
           [,writable=on|off][,bitmaps.0=<bitmap>...][,iothread=<id>]
                         export a node over NBD

  --chardev socket,id=<id>,path=<path>,server=on[,wait=on|off]
  --chardev socket,id=<id>,fd=<number or name>,server=on[,wait=on|off]
                         listen for clients of a monitor, one at a time; with
                         wait=on (the default) start-up waits for the first
  --chardev socket,id=<id>,path=<path>
                         connect to a client that listens
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on[,wait=on|off]]
                         the same over TCP; port 0 takes any free one
  --chardev stdio|null|pty,id=<id>
                         standard input and output; nothing; a new terminal,
                         whose name is told on standard error
  --chardev file,id=<id>,path=<path>[,input-path=<path>][,append=on|off]
  --chardev pipe,id=<id>,path=<path>
                         files of the host; a pair of FIFOs, <path>.in and <path>.out, or
                         one file for both directions
  --chardev ringbuf,id=<id>[,size=<bytes>]
                         memory that 'ringbuf-read' gives out

  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         serve QMP on a character device; give several for
                         several clients

  --qmp <path>           serve QMP on a socket at this path: a chardev and a monitor
                         in one, without waiting for a client

  --daemonize            go into the background; the started process ends when
                         the daemon is ready, with status 1 when it failed.
                         The daemon's working directory is then /
  --pidfile <path>       write the process id to a file, locked while the
                         daemon runs and removed at its end

  --sandbox on|strict|off
                         what the daemon gives up once it serves. on (default):
                         all capabilities, syscalls that serving does not need,
                         and every path except --allow-dir, --redo-dir and the
                         directories of its own sockets and pid file (these only
                         to make and remove sockets). What the kernel cannot restrict is
                         logged. strict: start only with all of it, and end the
                         process at a refused syscall. off: for debugging
  --allow-dir <dir>      files beneath it can be opened after start-up
                         (blockdev-add) and by names inside images; repeatable.
                         Without it, images are those of the command line

  --redo-dir <dir>       where changes of image metadata are kept until they are on
                         disk, for the successor of a killed daemon: a directory
                         of this user on tmpfs, the same after a restart
                         (default: /dev/shm/outboard-<uid>)

  --log-level <level>    error, warn (default), info, debug, trace, or filters
                         as in engine=debug,info; overrides $RUST_LOG. The log
                         goes to standard error

Signals
  SIGTERM, SIGINT, SIGHUP end the daemon: requests in flight complete, images are
  flushed and closed. A second one ends it at once.

Environment
  NOTIFY_SOCKET          told READY=1 and STOPPING=1 (systemd Type=notify)
  LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID
                         sockets handed over by systemd socket activation
  OUTBOARD_ALLOW_DIRS    more directories as of --allow-dir, separated by :
  RUST_LOG               default of --log-level

Exit status
  0 after an orderly end, 1 when start-up failed or an image could not be flushed,
  101 after a defect of the daemon itself: start it again with the same options.

Example
  outboard-blkd --object iothread,id=io0 \\
    --blockdev qcow2,node-name=disk,file.driver=file,file.filename=vm.qcow2 \\
    --export vhost-user-blk,id=vda,node-name=disk,addr.type=unix,addr.path=/run/vm/vda.sock,writable=on,iothread=io0 \\
    --chardev socket,id=qmp,path=/run/vm/qmp.sock,server=on,wait=off --monitor qmp
";
